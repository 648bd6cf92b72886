"""`--option prompt`: zero-shot classification by asking for the label."""

import argparse
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

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
from minllama.common.settings import Settings, flag
from minllama.evaluation.classification import model_eval, report_results
from minllama.evaluation.metrics import check_metrics_file
from minllama.kernels.cpu import accelerate, keep_freed_memory
from minllama.kernels.quantize import prepare_for_decoding
from minllama.text.batches import Example, make_loader
from minllama.text.labelled import (
    check_labels,
    create_data,
    fit_context,
    load_label_names,
    read_labelled,
)
from minllama.text.prompts import TEMPLATE, frame, make_prompts
from minllama.training import distributed
from tokenizer import Tokenizer, check_vocabulary
from utils import pick_device

CONTENT_FREE = MappingProxyType(
    {
        "contextual": ("N/A", "[MASK]", ""),  # arXiv 2102.09690, section 5
        "pmi": ("",),  # the domain prompt, arXiv 2104.08315, section 3
    }
)


@dataclass(frozen=True, kw_only=True)
class ZeroShotSettings(TaskSettings):
    """How labels are asked for."""

    title = "prompt and predict"
    description = None

    prompt_template: str = flag(
        TEMPLATE,
        "the prompt, with {sentence}, and {labels} where their names are to be listed",
        metavar="TEXT",
    )
    calibrate: str | None = flag(
        None,
        "divide a label's probability by that after prompts without content, or without sentence; "
        "needs --causal",
        choices=tuple(CONTENT_FREE),
    )


@dataclass(frozen=True, kw_only=True)
class PromptSettings(ZeroShotSettings, ClassifySettings):
    """Zero-shot classification of dev and test."""

    title = "prompt"
    description = None

    def resolved(self) -> Self:
        settings = self.with_demo(DEMO_MODEL, DEMO_DATA)
        path = settings.tokenizer_path or find_tokenizer(settings.pretrained_model_path)
        return settings.replace(tokenizer_path=path).with_output_names("prompting")

    @property
    def advanced(self) -> dict[str, Any]:
        changed = self.changed()
        return {name: changed[name] for name in ("prompt_template", "calibrate") if name in changed}


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig(Settings):
    """What `LlamaZeroShotClassifier` takes."""

    pretrained_model_path: str
    num_labels: int
    causal: bool | None
    init_weights: bool = False  # prompting draws no random numbers


def prompt(settings: PromptSettings) -> None:
    """Classify dev and test, print the accuracies and write the predictions.

    Without a mask this is the assignment's way: `max_sentence_len` truncates sentence and question
    together, and the last column of the padded batch is read. With causal attention the question
    stays whole, and every row's own last token is read.
    """
    distributed.require_one_process("prompt")
    keep_freed_memory()
    with explain_out_of_memory("prompting", LESS_MEMORY):
        classify_splits(settings)


def test_with_prompting(args: argparse.Namespace) -> None:
    """Classify dev and test by prompting; the assignment's function."""
    classify_splits(PromptSettings.from_args(args))


def classify_splits(settings: PromptSettings) -> None:
    """Classify dev and test."""
    settings.check_output_names("prompting", "pretrained_model_path" in settings.explicit)
    check_metrics_file(settings.metrics_out)
    label_names = load_label_names(settings.label_names)
    frame(settings.prompt_template, label_names)
    for filename in (settings.train, settings.dev, settings.test):
        sentences = read_labelled(filename)
        check_labels(sentences, filename, len(label_names), settings.label_names)
    asking = Asking(settings, label_names)
    tokenizer = asking.tokenizer
    create_data(settings.train, tokenizer, "train")  # for its count, which the assignment prints
    splits = {
        split: create_data(getattr(settings, split), tokenizer, split, eos=False)
        for split in ("dev", "test")
    }
    loaders = {
        split: make_loader(data, settings.batch_size, tokenizer.pad_id, causal=asking.causal)
        for split, data in zip(splits, asking.rows(*splits.values()), strict=True)
    }
    model, device = asking.model, asking.device
    report_results(
        settings, loaders, lambda loader: model_eval(loader, model, device), device, label_names
    )


test_with_prompting.__test__ = False  # not a test of pytest's, whatever its name


class Asking:
    """A language model that is asked for the label, with its tokenizer and its prompt.

    Attributes:
        model: takes ids, and if `causal` lengths, to scores `(batch, num_labels)`.

    Raises:
        InputError: the flags do not go together, or the tokenizer is not the model's.
    """

    def __init__(self, settings: ZeroShotSettings, label_names: list[str]):
        self.template, self.label_names = settings.prompt_template, label_names
        self.device = pick_device(settings.use_gpu)
        self.tokenizer = Tokenizer(settings.max_sentence_len, settings.tokenizer_path)
        config = ZeroShotConfig(
            pretrained_model_path=settings.pretrained_model_path,
            num_labels=len(label_names),
            causal=settings.causal,
        )
        zero_shot = LlamaZeroShotClassifier(config, self.tokenizer, label_names).to(self.device)
        llama = zero_shot.llama
        check_vocabulary(self.tokenizer, llama.vocab_size, settings.pretrained_model_path)
        self.causal = llama.config.causal
        if settings.calibrate and not self.causal:
            raise InputError("--calibrate: scores without a mask depend on the batch; add --causal")
        accelerate(llama)
        # Without a mask and in float32 it stays the assignment's, to the digit.
        if self.causal or settings.dtype != "float32":
            prepare_for_decoding(llama, settings.dtype)
        self.max_prompt_len = zero_shot.max_prompt_len
        self.model: nn.Module = zero_shot
        if settings.calibrate:
            self.model = Calibrated(zero_shot, settings.calibrate, settings.prompt_template)

    def rows(self, *splits: list[Example]) -> list[list[Example]]:
        """The prompts that the model reads."""
        prompts = [
            make_prompts(data, self.template, self.label_names, self.tokenizer, causal=self.causal)
            for data in splits
        ]
        return fit_context(*prompts, max_len=self.max_prompt_len, keep="last")


class Calibrated(nn.Module):
    """A zero-shot classifier whose scores are log p(label | prompt) - log p(label | no content).

    Contextual calibration takes the mean of the labels' normalized probabilities over prompts
    around "N/A", "[MASK]" and nothing; PMI takes the probabilities after the prompt around nothing.

    Args:
        model: a causal model's classifier.
        method: "contextual" or "pmi".
        template: of the prompts.
    """

    def __init__(self, model: LlamaZeroShotClassifier, method: str, template: str):
        super().__init__()
        self.model = model
        model.eval()
        tokenizer = model.tokenizer
        empty = [
            Example(text, 0, tokenizer.encode(text, bos=True, eos=False, truncate=False))
            for text in CONTENT_FREE[method]
        ]
        prompts = make_prompts(empty, template, model.label_names, tokenizer, causal=True)
        device = next(model.parameters()).device
        (prompts,) = fit_context(prompts, max_len=model.max_prompt_len, keep="last")
        rows = [torch.tensor([ids], device=device) for _, _, ids in prompts]
        with torch.inference_mode():
            scores = [model(row, torch.tensor([row.shape[1]], device=device)) for row in rows]
        log_probs = F.log_softmax(torch.cat(scores), dim=-1)
        self.prior = log_probs.exp().mean(dim=0).log()

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Calibrated log-probabilities `(batch, num_labels)`, up to a constant of the row."""
        return self.model(input_ids, lengths) - self.prior
