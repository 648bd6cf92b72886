"""The flags of all options, of training and of new models; demo files for absent defaults."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from config import LlamaConfig
from minllama.common.errors import InputError
from minllama.common.files import check_outputs
from minllama.common.settings import Settings, flag, values_of

OPTIONS = ("generate", "prompt", "finetune", "pretrain", "predict")
DTYPES = ("float32", "bfloat16", "int8")
ASSIGNMENT_FLAGS = (  # in the order in which the assignment prints them
    "train",
    "dev",
    "test",
    "label_names",
    "pretrained_model_path",
    "max_sentence_len",
    "seed",
    "epochs",
    "option",
    "use_gpu",
    "generated_sentence_low_temp_out",
    "generated_sentence_high_temp_out",
    "dev_out",
    "test_out",
    "batch_size",
    "hidden_dropout_prob",
    "lr",
)
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "multiple_of", "max_seq_len")
LESS_MEMORY = "lower --batch_size or --max_sentence_len"
LESS_TRAINING_MEMORY = (
    "lower --batch_size (and raise --grad_accum) or --max_sentence_len, or add "
    "--activation_checkpointing or --dtype bfloat16"
)

DEMO = Path(__file__).parent.parent.parent / "data" / "demo"
DEMO_MODEL = {"pretrained_model_path": "model.pt"}
DEMO_LABELS = {"label_names": "reviews-label-mapping.json"}
DEMO_DATA = DEMO_LABELS | {
    "train": "reviews-train.txt",
    "dev": "reviews-dev.txt",
    "test": "reviews-test.txt",
}


def dataset_name(path: str, split: str) -> str:
    """The name of a dataset: "sst" for data/sst-dev.txt, the split "dev"."""
    return re.sub(f"[-_.]?{split}$", "", Path(path).stem) or "data"


@dataclass(frozen=True, kw_only=True)
class TaskSettings(Settings):
    """The flags of every option: the assignment's, and a few more.

    Attributes:
        explicit: the names of the flags on the command line.
    """

    title = "all options"
    description = "The assignment's flags. An option accepts those that it does not use."

    option: str = flag("generate", "task to run", choices=OPTIONS)
    pretrained_model_path: str = flag(
        "stories42M.pt", "the checkpoint to start from", spelling="--pretrained-model-path"
    )
    tokenizer_path: str | None = flag(
        None,
        "SentencePiece model (default: tokenizer.model beside the checkpoint or here)",
        spelling="--tokenizer-path",
    )
    causal: bool | None = flag(
        None,
        "mask later positions in attention (default: as the checkpoint says)",
    )
    dtype: str = flag(
        "float32",
        "weight dtype in generation and prompting, autocast dtype in training",
        choices=DTYPES,
    )
    max_sentence_len: int | None = flag(None, "truncate sentences to this many tokens", low=1)
    seed: int = flag(1337, "random seed", high=2**32 - 1)
    use_gpu: bool = flag(False, "run on CUDA if available, otherwise on MPS")
    train: str = flag("data/cfimdb-train.txt", "labelled sentences to train on")
    dev: str = flag("data/cfimdb-dev.txt", "labelled sentences used to select the best epoch")
    test: str = flag("data/cfimdb-test.txt", "labelled sentences to test on")
    label_names: str = flag(
        "data/cfimdb-label-mapping.json",
        "JSON list of label names; prompting requires it",
        spelling="--label-names",
    )
    batch_size: int = flag(8, "examples per batch", low=1)
    epochs: int = flag(5, "passes over the training set", low=1)
    lr: float = flag(2e-5, "learning rate")
    hidden_dropout_prob: float = flag(0.3, "dropout before the classification head", high=1)
    dev_out: str = flag(
        "cfimdb-dev-prompting-output.txt",
        "file for predictions on dev (default: named after data and option)",
    )
    test_out: str = flag(
        "cfimdb-test-prompting-output.txt",
        "file for predictions on test (default: named after data and option)",
    )
    generated_sentence_low_temp_out: str = flag(
        "generated-sentence-temp-0.txt", "file for the text generated at temperature 0"
    )
    generated_sentence_high_temp_out: str = flag(
        "generated-sentence-temp-1.txt", "file for the text generated at temperature 1"
    )
    explicit: tuple[str, ...] = ()

    @classmethod
    def from_flags(cls, values: dict[str, Any]) -> Self:
        """Build the settings from the flags on the command line."""
        return cls(**cls.select_fields(values), explicit=tuple(sorted(values)))

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Build the settings from a Namespace, or any object with some flags as attributes."""
        if isinstance(args, cls):
            return args
        return cls.from_flags({"option": cls.title} | values_of(args, cls.defaults())).resolved()

    def resolved(self) -> Self:
        """Fill in settings that depend on others, and on the files that are there."""
        return self

    def with_demo(self, *groups: dict[str, str]) -> Self:
        """Replace default paths whose files are absent by files of the demo, and report it.

        Args:
            groups: names of flags with the demo's files. A group is replaced only if all its files
                are absent and none of its flags was given.
        """
        paths: dict[str, str] = {}
        for group in groups:
            defaults = [getattr(self, name) for name in group]
            is_wanted = group.keys().isdisjoint(self.explicit)
            is_absent = not any(Path(path).exists() for path in defaults)
            if is_wanted and is_absent and all((DEMO / file).is_file() for file in group.values()):
                demo = {name: demo_path(file) for name, file in group.items()}
                print(
                    f"{', '.join(defaults)}: not found; using the demo's files "
                    f"{', '.join(demo.values())}; `bash setup.sh` fetches the assignment's",
                    file=sys.stderr,
                )
                paths |= demo
        return self.replace(**paths)


def demo_path(file: str) -> str:
    """The path of a demo file, relative if the repository is in the working folder."""
    is_inside = DEMO.is_relative_to(Path.cwd())
    return str((DEMO / file).relative_to(Path.cwd()) if is_inside else DEMO / file)


@dataclass(frozen=True, kw_only=True)
class ClassifySettings(TaskSettings):
    """The flags that prompting and fine-tuning share."""

    title = "prompt and finetune"

    metrics_out: str | None = flag(
        None, "append accuracies, F1 and speeds as JSON lines", metavar="FILE.jsonl"
    )
    report: bool = flag(False, "print scores per class and the confusion matrix")

    @property
    def is_advanced(self) -> bool:
        """Whether a flag of a method or of the prompt is on: outputs are then "advanced" ones."""
        raise NotImplementedError

    def with_output_names(self, kind: str) -> Self:
        """Name each file of predictions after its data and option, unless its name was given.

        Args:
            kind: "prompting" or "finetuning"; an advanced flag makes it "advanced".
        """
        kind = "advanced" if self.is_advanced else kind
        dev, test = dataset_name(self.dev, "dev"), dataset_name(self.test, "test")
        names = {
            "dev_out": f"{dev}-dev-{kind}-output.txt",
            "test_out": f"{test}-test-{kind}-output.txt",
        }
        return self.replace(**{n: name for n, name in names.items() if n not in self.explicit})

    def check_output_names(
        self, kind: str, own_weights: bool, outputs: Sequence[str] = (), inputs: Sequence[str] = ()
    ) -> None:
        """Check, before any work, that all results can be written.

        Args:
            kind: "prompting" or "finetuning", part of the names of the files.
            own_weights: whether the model is not the assignment's. The names may then say
                "advanced", as with an advanced flag.
            outputs: files that are written besides predictions and metrics.
            inputs: files that are read besides data, model and tokenizer.

        Raises:
            InputError: a name does not end as the assignment requires, or cannot be written.
        """
        kinds = [kind, "advanced"] if self.is_advanced or own_weights else [kind]
        for split, outfile in (("dev", self.dev_out), ("test", self.test_out)):
            endings = [f"{split}-{allowed}-output.txt" for allowed in kinds]
            if not outfile.endswith(tuple(endings)):
                raise InputError(
                    f"--{split}_out {outfile}: the name must end in {' or '.join(endings)}, "
                    f"as in sst-{endings[0]}"
                )
        reads = [self.train, self.dev, self.test, self.label_names, self.pretrained_model_path]
        reads += [self.tokenizer_path or "tokenizer.model", *inputs]
        writes = [self.dev_out, self.test_out, *outputs]
        if self.metrics_out is not None:
            writes.append(self.metrics_out)
        check_outputs(writes, reads)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(TaskSettings):
    """The flags that fine-tuning and pre-training share."""

    title = "finetune and pretrain"

    dtype: str = flag("float32", "dtype of autocast", choices=("float32", "bfloat16"))
    grad_accum: int = flag(1, "batches per optimizer step", low=1)
    activation_checkpointing: bool = flag(
        False, "recompute activations in the backward pass to save memory"
    )
    plot: str | None = flag(None, "draw loss and accuracy curves, an SVG or PNG file")
    shard: bool = flag(False, "shard the model over the processes of torchrun (FSDP2)")
    compile: bool = flag(
        False, "compile training layers (torch.compile) or causal decoding (Numba)"
    )


@dataclass(frozen=True, kw_only=True)
class ShapeSettings(Settings):
    """The flags that describe a new model."""

    dim: int = flag(256, "width of the residual stream", low=1)
    n_layers: int = flag(6, "number of layers", low=1)
    n_heads: int = flag(4, "number of query heads", low=1)
    n_kv_heads: int | None = flag(None, "key and value heads (default: as --n_heads)", low=1)
    hidden_dim: int | None = flag(None, "feed-forward width (default: 8/3 of --dim)", low=1)
    multiple_of: int = flag(32, "the default of --hidden_dim is rounded up to it", low=1)
    max_seq_len: int | None = flag(
        None, "context and sequence length in tokens (default: 256, or the checkpoint's)", low=1
    )
    dropout: float = flag(0.0, "dropout of embeddings and sub-layers", high=1)
    attention_dropout: float | None = flag(
        None, "dropout of attention weights (default: as --dropout)", high=1
    )

    def config(self, vocab_size: int) -> LlamaConfig:
        """The configuration of a new causal model.

        Raises:
            InputError: no model has this shape.
        """
        shape = {name: getattr(self, name) for name in SHAPE}
        shape["max_seq_len"] = self.max_seq_len or 256
        config = LlamaConfig(
            vocab_size=vocab_size,
            causal=True,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            **shape,
        )
        try:
            config.validate()
        except ValueError as error:
            raise InputError(f"no such model: {error}") from error
        return config
