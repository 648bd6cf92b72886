"""A classifier with what its training and evaluation need beside the model."""

from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from classifier import LlamaEmbeddingClassifier, SentenceClassifier
from minllama.common.errors import InputError
from minllama.common.flags import TaskSettings
from minllama.evaluation.classification import Evaluation, model_eval
from minllama.kernels.cpu import accelerate
from minllama.methods.saved import ClassifierConfig, check_frozen, load_weights, read_classifier
from minllama.methods.settings import FinetuneSettings
from minllama.text.batches import Example, make_loader
from minllama.text.labelled import encode, fit_context, load_label_names, read_splits
from minllama.training import distributed
from minllama.training.precision import mixed_precision
from minllama.training.prepare import prepare_for_training
from tokenizer import Tokenizer, check_fingerprint, check_vocabulary
from utils import autocast_dtype, pick_device


@dataclass
class Classifier:
    """A classifier, its tokenizer, and how it runs.

    Attributes:
        dtype: precision of matrix products, by autocast.
    """

    model: SentenceClassifier
    tokenizer: Tokenizer
    config: ClassifierConfig
    device: torch.device
    dtype: str

    def tokenize(self, *splits: list[Example]) -> list[list[Example]]:
        """Tokenize sentences, or what a method makes of them, truncated to the model's context."""
        tokenized = [encode(split, self.tokenizer) for split in splits]
        for method in self.config.methods:
            examples = method.examples(self.model, self.tokenizer, tokenized)
            if examples is not None:
                return examples
        return fit_context(*tokenized, max_len=self.model.llama.config.max_seq_len, keep="first")

    def loader(self, examples: list[Example], batch_size: int, shuffle: bool = False) -> DataLoader:
        """Batches of examples, with lengths if the model needs each one's last token."""
        return make_loader(
            examples,
            batch_size,
            self.tokenizer.pad_id,
            causal=self.model.llama.config.causal,
            shuffle=shuffle,
            with_lengths=self.model.reads_lengths,
        )

    def evaluate(self, loader: DataLoader) -> Evaluation:
        """Classify a loader's examples, and score the result."""
        with mixed_precision(self.device, self.dtype):
            return model_eval(loader, self.model, self.device)

    def merge(self) -> None:
        """Merge the layers that methods have added into the weights, for faster inference."""
        if not distributed.is_sharded(self.model):
            for method in self.config.methods:
                method.merge(self.model)


def make_classifier(settings: TaskSettings, config: ClassifierConfig) -> Classifier:
    """Build a classifier, and let its methods adapt it.

    Raises:
        InputError: the tokenizer is another model's.
    """
    device = pick_device(settings.use_gpu)
    tokenizer = Tokenizer(settings.max_sentence_len, settings.tokenizer_path)
    model: SentenceClassifier | None = None
    for method in config.methods:
        model = model or method.build(config, tokenizer)
    model = model or LlamaEmbeddingClassifier(config)
    check_vocabulary(tokenizer, model.llama.config, config.pretrained_model_path)
    accelerate(model.llama)
    for method in config.methods:
        method.adapt(model)
    config = config.replace(causal=model.llama.config.causal, tokenizer=tokenizer.fingerprint)
    return Classifier(model.to(device), tokenizer, config, device, settings.dtype)


def build(settings: FinetuneSettings) -> tuple[Classifier, list[list[Example]]]:
    """Build a classifier to be fine-tuned, and the examples of train, dev and test.

    Raises:
        InputError: a label is out of range, or a flag does not suit the model.
    """
    paths = {"train": settings.train, "dev": settings.dev, "test": settings.test}
    names = load_label_names(settings.label_names) if settings.reads_label_names else None
    n_names = None if names is None else len(names)
    sentences, num_labels = read_splits(paths, n_names, settings.label_names)
    config = ClassifierConfig(
        pretrained_model_path=settings.pretrained_model_path,
        num_labels=num_labels,
        option=settings.option,
        hidden_dropout_prob=settings.hidden_dropout_prob,
        causal=settings.causal,
        label_names=names,
        methods=settings.methods,
    )
    classifier = make_classifier(settings, config)
    model = classifier.model
    if settings.activation_checkpointing and model.uses_cache:
        raise InputError(
            "--activation_checkpointing: labels of several tokens continue a causal model's prompt "
            "through its cache, which cannot be recomputed"
        )
    classifier.dtype = prepare_for_training(model, model.llama.layers, settings)
    for split in ("train", "dev"):
        print(f"load {len(sentences[split])} data from {paths[split]}")
    for method in settings.methods:
        sentences["train"] = method.choose(sentences["train"], num_labels, settings.seed)
    return classifier, classifier.tokenize(*sentences.values())


def load(settings: TaskSettings, path: str) -> Classifier:
    """Load a classifier that fine-tuning saved, for inference.

    Raises:
        InputError: it was trained on other weights or with another tokenizer, or the flags name
            other labels.
    """
    saved, config = read_classifier(path)
    base = settings.pretrained_model_path
    if "label_names" in settings.explicit:
        names = load_label_names(settings.label_names)
        if len(names) != config.num_labels or config.label_names not in (None, names):
            known = config.label_names or f"{config.num_labels} labels"
            raise InputError(f"{settings.label_names}: {path} was trained with {known}")
        config = config.replace(label_names=names)
    config = config.replace(pretrained_model_path=base, init_weights=False)
    classifier = make_classifier(settings, config)
    classifier.dtype = autocast_dtype(settings.dtype, classifier.device)
    check_fingerprint(classifier.tokenizer, config.tokenizer, path)
    load_weights(classifier.model, saved["model"], path)
    check_frozen(classifier.model, saved, path, base)
    classifier.merge()
    return classifier
