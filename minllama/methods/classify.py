"""A classifier with what its training and evaluation need beside the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from classifier import SentenceClassifier
from minllama import methods
from minllama.common.errors import InputError
from minllama.common.flags import TaskSettings
from minllama.evaluation.classification import Evaluation, model_eval
from minllama.methods.base import Method
from minllama.methods.saved import (
    ClassifierConfig,
    SavedClassifier,
    check_frozen,
    config_to_load,
    load_weights,
)
from minllama.methods.settings import FinetuneSettings
from minllama.text.batches import Example, make_loader
from minllama.text.labelled import (
    LabelledSentence,
    check_labels,
    encode,
    load_label_names,
    read_labelled,
)
from minllama.training import distributed
from minllama.training.precision import mixed_precision
from minllama.training.prepare import prepare_for_training
from tokenizer import Tokenizer
from utils import pick_device


@dataclass
class Classifier:
    """A classifier, its tokenizer, and how it runs.

    Attributes:
        dtype: of matrix products, by autocast.
    """

    model: SentenceClassifier
    tokenizer: Tokenizer
    config: ClassifierConfig
    methods: tuple[Method, ...]
    device: torch.device
    dtype: str

    def inputs(self, *splits: Sequence[LabelledSentence]) -> list[list[Example]]:
        """Tokenize sentences as the model reads them, truncated to its context."""
        examples = [encode(split, self.tokenizer) for split in splits]
        return methods.model_inputs(self.model, self.methods, self.tokenizer, *examples)

    def loader(self, inputs: list[Example], batch_size: int, shuffle: bool = False) -> DataLoader:
        """Batches of examples, with lengths if the model needs each one's last token."""
        return make_loader(
            inputs,
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
            for method in self.methods:
                method.merge(self.model)

    def shard(self) -> None:
        """Shard the model over the processes, for inference."""
        if distributed.shard(self.model, self.model.llama.layers, self.dtype):
            self.dtype = "float32"  # of autocast


def make_classifier(
    settings: TaskSettings, config: ClassifierConfig, active: tuple[Method, ...]
) -> Classifier:
    """Build a classifier as some methods train it."""
    device = pick_device(settings.use_gpu)
    tokenizer = Tokenizer(settings.max_sentence_len, settings.tokenizer_path)
    model = methods.build_classifier(config, active, tokenizer).to(device)
    config = config.replace(causal=model.llama.config.causal)
    return Classifier(model, tokenizer, config, active, device, settings.dtype)


def build(settings: FinetuneSettings) -> tuple[Classifier, list[list[Example]]]:
    """Build a classifier to be fine-tuned, and its inputs of train, dev and test.

    Raises:
        InputError: a label is out of range, or a flag does not suit the model.
    """
    paths = {"train": settings.train, "dev": settings.dev, "test": settings.test}
    sentences = {split: read_labelled(path) for split, path in paths.items()}
    names, source = None, settings.train
    num_labels = len({sentence.label for sentence in sentences["train"]})
    if "label_names" in settings.explicit or methods.need_label_names(settings.methods):
        names, source = load_label_names(settings.label_names), settings.label_names
        num_labels = len(names)
    for split, path in paths.items():
        check_labels(sentences[split], path, num_labels, source)
    config = ClassifierConfig(
        pretrained_model_path=settings.pretrained_model_path,
        num_labels=num_labels,
        option=settings.option,
        hidden_dropout_prob=settings.hidden_dropout_prob,
        causal=settings.causal,
        label_names=names,
    )
    classifier = make_classifier(settings, config, settings.methods)
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
    return classifier, classifier.inputs(*sentences.values())


def load(settings: TaskSettings, saved: SavedClassifier) -> Classifier:
    """Load a classifier that a run saved, for inference.

    Raises:
        InputError: it was trained on other weights, or the flags name other labels.
    """
    config = config_to_load(saved, settings)
    classifier = make_classifier(settings, config, saved.methods)
    load_weights(classifier.model, saved.weights, saved.path)
    check_frozen(classifier.model, saved, config.pretrained_model_path)
    classifier.merge()
    return classifier
