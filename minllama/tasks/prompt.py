"""`--option prompt`: zero-shot classification by asking for the label."""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F

from classifier import LlamaZeroShotClassifier
from minllama.checkpoints.formats import find_tokenizer
from minllama.common.errors import InputError, explain_out_of_memory
from minllama.common.flags import (
    DEMO_DATA,
    DEMO_MODEL,
    LESS_MEMORY,
    ClassifySettings,
    TaskSettings,
)
from minllama.common.settings import flag
from minllama.evaluation.classification import report_results
from minllama.evaluation.metrics import check_metrics_file
from minllama.kernels.cpu import accelerate, keep_freed_memory
from minllama.kernels.quantize import prepare_for_decoding
from minllama.methods.classify import Classifier
from minllama.methods.prompt_based import PromptBased
from minllama.methods.saved import ClassifierConfig
from minllama.text.batches import Example
from minllama.text.labelled import fit_context, load_label_names, read_splits
from minllama.text.prompts import TEMPLATE, fill_template, make_prompts
from minllama.training import distributed
from tokenizer import Tokenizer
from utils import pick_device

# Sentences without content, for each way of calibration.
CONTENT_FREE = {
    "contextual": ("N/A", "[MASK]", ""),  # arXiv 2102.09690, section 5
    "pmi": ("",),  # the domain prompt of arXiv 2104.08315, section 3
}


@dataclass(frozen=True, kw_only=True)
class ZeroShotSettings(TaskSettings):
    """The flags of the prompt."""

    title = "prompt and predict"

    prompt_template: str = flag(
        TEMPLATE,
        "prompt with {sentence}, and optionally {labels} for their names",
        metavar="TEXT",
    )
    calibrate: str | None = flag(
        None,
        "divide a label's probability by that after prompts without content, or without sentence; "
        "requires --causal",
        choices=tuple(CONTENT_FREE),
    )


@dataclass(frozen=True, kw_only=True)
class PromptSettings(ZeroShotSettings, ClassifySettings):
    """The flags of zero-shot classification."""

    title = "prompt"

    def resolved(self) -> Self:
        settings = self.with_demo(DEMO_MODEL, DEMO_DATA)
        path = settings.tokenizer_path or find_tokenizer(settings.pretrained_model_path)
        return settings.replace(tokenizer_path=path).with_output_names("prompting")

    @property
    def is_advanced(self) -> bool:
        return not self.changed().keys().isdisjoint(("prompt_template", "calibrate"))


def prompt(settings: PromptSettings) -> None:
    """Classify dev and test, print the accuracies and write the predictions.

    Without a mask this is the assignment's way: `max_sentence_len` truncates sentence and question
    together, and the last column of the padded batch is read. In causal mode the question stays
    whole, and each example is read at its own last token.
    """
    distributed.require_one_process("prompt")
    settings.check_output_names("prompting", "pretrained_model_path" in settings.explicit)
    check_metrics_file(settings.metrics_out)
    keep_freed_memory()
    label_names = load_label_names(settings.label_names)
    paths = {"train": settings.train, "dev": settings.dev, "test": settings.test}
    sentences, _ = read_splits(paths, len(label_names), settings.label_names)
    with explain_out_of_memory("prompting", LESS_MEMORY):
        classifier = zero_shot_classifier(settings, label_names)
        for split, path in paths.items():  # train is counted only, as in the assignment
            print(f"load {len(sentences[split])} data from {path}")
        dev, test = classifier.tokenize(sentences["dev"], sentences["test"])
        loaders = {
            "dev": classifier.loader(dev, settings.batch_size),
            "test": classifier.loader(test, settings.batch_size),
        }
        report_results(settings, loaders, classifier.evaluate, classifier.device, label_names)


def test_with_prompting(args: Any) -> None:
    """Classify dev and test by prompting; the assignment's function."""
    prompt(PromptSettings.from_args(args))


test_with_prompting.__test__ = False  # type: ignore[attr-defined]  # not one of pytest's


def zero_shot_classifier(settings: ZeroShotSettings, label_names: list[str]) -> Classifier:
    """Load a model that classifies prompts; nothing is trained.

    Raises:
        InputError: the flags cannot be combined, or the tokenizer is another model's.
    """
    fill_template(settings.prompt_template, label_names)  # checks it before the model is loaded
    device = pick_device(settings.use_gpu)
    tokenizer = Tokenizer(settings.max_sentence_len, settings.tokenizer_path)
    config = ClassifierConfig(
        pretrained_model_path=settings.pretrained_model_path,
        num_labels=len(label_names),
        option="finetune",
        hidden_dropout_prob=0.0,
        causal=settings.causal,
        label_names=label_names,
        init_weights=False,
        methods=(PromptBased(prompt_based=True, prompt_template=settings.prompt_template),),
    )
    model_class = CalibratedClassifier if settings.calibrate else LlamaZeroShotClassifier
    model = model_class(config, tokenizer, label_names).to(device).eval()
    is_causal = model.llama.config.causal
    if settings.calibrate and not is_causal:
        raise InputError("--calibrate: scores without a mask depend on the batch; add --causal")
    accelerate(model.llama)
    # Without a mask and in float32 the results stay the assignment's, to the digit.
    if is_causal or settings.dtype != "float32":
        prepare_for_decoding(model.llama, settings.dtype)
    if settings.calibrate and isinstance(model, CalibratedClassifier):
        model.calibrate(CONTENT_FREE[settings.calibrate], settings.prompt_template)
    return Classifier(model, tokenizer, config, device, dtype="float32")


class CalibratedClassifier(LlamaZeroShotClassifier):
    """A causal zero-shot classifier with scores log p(label | prompt) - log p(label | no content).

    Contextual calibration averages the normalized probabilities of the labels over prompts around
    "N/A", "[MASK]" and nothing; PMI takes those after the prompt around nothing.

    Attributes:
        prior: log p(label | no content), `(num_labels,)`.
    """

    prior: torch.Tensor | float = 0.0

    @torch.inference_mode()
    def calibrate(self, content_free: tuple[str, ...], template: str) -> None:
        """Compute the prior from prompts around sentences without content."""
        encode = self.tokenizer.encode
        sentences = [
            Example(text, 0, encode(text, bos=True, eos=False, truncate=False))
            for text in content_free
        ]
        prompts = make_prompts(sentences, template, self.label_names, self.tokenizer, causal=True)
        (prompts,) = fit_context(prompts, max_len=self.max_prompt_len, keep="last")
        device = next(self.parameters()).device
        log_probs = []
        for prompt in prompts:
            ids = torch.tensor([prompt.ids], device=device)  # (1, seqlen)
            lengths = torch.tensor([len(prompt.ids)], device=device)
            log_probs.append(F.log_softmax(super().forward(ids, lengths), dim=-1))
        self.prior = torch.cat(log_probs).exp().mean(dim=0).log()

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Calibrated log-probabilities `(batch, num_labels)`, up to a constant per example."""
        return super().forward(input_ids, lengths) - self.prior
