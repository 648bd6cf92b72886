"""The flags that all options share, and the demo files that stand in for absent defaults."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from minllama.checkpoints.formats import tokenizer_beside
from minllama.common.errors import InputError
from minllama.common.files import check_outputs
from minllama.common.settings import Settings, flag
from minllama.kernels.quantize import DTYPES
from tokenizer import TOKENIZER_MODEL

OPTIONS = ("generate", "prompt", "finetune", "pretrain", "predict")
ASSIGNMENT_FLAGS = (  # as the assignment prints them; every option takes them
    *("train", "dev", "test", "label_names", "pretrained_model_path", "max_sentence_len", "seed"),
    *("epochs", "option", "use_gpu", "generated_sentence_low_temp_out"),
    *("generated_sentence_high_temp_out", "dev_out", "test_out", "batch_size"),
    *("hidden_dropout_prob", "lr"),
)


DEMO = Path(__file__).parent.parent.parent / "data" / "demo"
DEMO_MODEL = {"pretrained_model_path": "model.pt"}
DEMO_DATA = {
    "train": "reviews-train.txt",
    "dev": "reviews-dev.txt",
    "test": "reviews-test.txt",
    "label_names": "reviews-label-mapping.json",
}


def demo_path(file: str) -> str:
    """The path of a file of the demo, relative where the repository is the working folder."""
    is_inside = DEMO.is_relative_to(Path.cwd())
    return str((DEMO / file).relative_to(Path.cwd()) if is_inside else DEMO / file)


def dataset_of(path: str, split: str) -> str:
    """The name of the data: data/sst-dev.txt is sst's dev."""
    return re.sub(f"[-_.]?{split}$", "", Path(path).stem) or "data"


@dataclass(frozen=True, kw_only=True)
class TaskSettings(Settings):
    """The assignment's flags, and what every option has besides.

    Attributes:
        explicit: the names of the flags on the command line.
        demo: the files of the demo that may stand in, in groups: those of a group only together.
        takes_methods: whether the flags of methods act.
        takes_processes: whether `torchrun` may start several processes.
        less_memory: what to do where memory runs out.
        outlives_output: whether the work goes on when standard output cannot be written any more.
        shows_args: whether the flags are printed, as the assignment does.
        keeps_freed_memory: whether `minllama.kernels.cpu.keep_freed_memory` pays; it costs some memory.
    """

    demo: ClassVar[tuple[dict[str, str], ...]] = (DEMO_MODEL, DEMO_DATA)
    takes_methods: ClassVar[bool] = False
    takes_processes: ClassVar[bool] = False
    less_memory: ClassVar[str] = "lower --batch_size or --max_sentence_len"
    outlives_output: ClassVar[bool] = False
    shows_args: ClassVar[bool] = True
    keeps_freed_memory: ClassVar[bool] = True

    title = "all options"
    description = "The assignment's flags; those of other options are taken and not used."

    option: str = flag("generate", "what to do", choices=OPTIONS)
    pretrained_model_path: str = flag(
        "stories42M.pt", "the checkpoint to start from", spelling="--pretrained-model-path"
    )
    tokenizer_path: str | None = flag(
        None,
        f"SentencePiece model; by default {TOKENIZER_MODEL} beside the checkpoint, else here",
        spelling="--tokenizer-path",
    )
    causal: bool | None = flag(
        None,
        "attend only to what came before, or to everything; by default as the checkpoint says",
    )
    dtype: str = flag(
        "float32",
        "of the weights when generating or prompting, where less pays with --causal on a CPU; of "
        "the products when training",
        choices=DTYPES,
    )
    max_sentence_len: int | None = flag(None, "keep this many tokens of a sentence", low=1)
    seed: int = flag(1337, "of every random draw", high=2**32 - 1)
    verify: bool = flag(
        False, "compare every checkpoint with its checksums first; up to 1 GB this is always done"
    )
    use_gpu: bool = flag(False, "run on CUDA, or else MPS")
    train: str = flag("data/cfimdb-train.txt", "labelled sentences to train on")
    dev: str = flag("data/cfimdb-dev.txt", "labelled sentences to choose by")
    test: str = flag("data/cfimdb-test.txt", "labelled sentences to test on")
    label_names: str = flag(
        "data/cfimdb-label-mapping.json",
        "JSON list of the labels' names; prompting needs it, fine-tuning checks against it",
        spelling="--label-names",
    )
    batch_size: int = flag(8, "rows per batch", low=1)
    epochs: int = flag(5, "passes over train", low=1)
    lr: float = flag(2e-5, "learning rate")
    hidden_dropout_prob: float = flag(0.3, "dropout before the new head", high=1)
    dev_out: str = flag(
        "cfimdb-dev-prompting-output.txt",
        "file for the predictions on dev; by default named for the data and the option",
    )
    test_out: str = flag(
        "cfimdb-test-prompting-output.txt",
        "file for the predictions on test; by default named for the data and the option",
    )
    generated_sentence_low_temp_out: str = flag(
        "generated-sentence-temp-0.txt", "file for the text generated at temperature 0"
    )
    generated_sentence_high_temp_out: str = flag(
        "generated-sentence-temp-1.txt", "file for the text generated at temperature 1"
    )
    explicit: tuple[str, ...] = ()

    @classmethod
    def from_saved_run(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The flags on the command line, and those that they bring with them."""
        return given

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints that are read."""
        return [self.pretrained_model_path]

    def resolved(self) -> Self:
        """The same with what depends on other flags and on the files that are there."""
        return self.with_demo().with_tokenizer()

    def with_demo(self) -> Self:
        """Take the demo's files for default paths whose files are absent, and say so.

        A group of files is replaced only if all of them are absent and none of them was given.
        """
        paths: dict[str, str] = {}
        for stand_ins in self.demo:
            defaults = [getattr(self, name) for name in stand_ins]
            is_complete = all((DEMO / file).is_file() for file in stand_ins.values())
            is_there = any(Path(path).exists() for path in defaults)
            if is_there or not is_complete or not stand_ins.keys().isdisjoint(self.explicit):
                continue
            new = {name: demo_path(file) for name, file in stand_ins.items()}
            print(
                f"{', '.join(defaults)}: not here; used instead, from this repository: "
                f"{', '.join(new.values())}; `bash setup.sh` fetches the assignment's",
                file=sys.stderr,
            )
            paths |= new
        return self.replace(**paths)

    def with_tokenizer(self) -> Self:
        """Name the tokenizer beside the checkpoint, or else the one in the working folder."""
        if self.tokenizer_path is not None:
            return self
        beside = tokenizer_beside(self.pretrained_model_path)
        return self.replace(tokenizer_path=str(beside or TOKENIZER_MODEL))


@dataclass(frozen=True, kw_only=True)
class ClassifySettings(TaskSettings):
    """What prompting and fine-tuning share."""

    title = "prompt and finetune"
    description = None

    metrics_out: str | None = flag(
        None, "append accuracies, F1 and speeds as JSON lines", metavar="FILE.jsonl"
    )
    report: bool = flag(False, "print every class's scores and the confusion matrix")

    @property
    def advanced(self) -> dict[str, Any]:
        """The flags that make the predictions other than the assignment's, with their values."""
        raise NotImplementedError

    def with_output_names(self, kind: str) -> Self:
        """Name the files of predictions where no name is given: data/sst-dev.txt is sst's dev.

        Args:
            kind: "prompting" or "finetuning"; with an advanced flag the names tell that instead.
        """
        if not {"dev_out", "test_out"}.isdisjoint(self.explicit):
            return self
        names = {}
        for split in ("dev", "test"):
            dataset = dataset_of(getattr(self, split), split)
            names[f"{split}_out"] = (
                f"{dataset}-{split}-{'advanced' if self.advanced else kind}-output.txt"
            )
        return self.replace(**names)

    def check_output_names(
        self, kind: str, own_weights: bool, *outputs: str, reads: Sequence[str] = ()
    ) -> None:
        """See, before any work, that all results can be written where they are wanted.

        Args:
            kind: "prompting" or "finetuning", which the names tell.
            own_weights: whether the model is not the assignment's; the names may then tell
                "advanced", as with an advanced flag.
            outputs: what is written besides the predictions.
            reads: what is read besides data, model and tokenizer.

        Raises:
            InputError: a name does not end as the assignment has it, or no file can be written
                there.
        """
        kinds = [kind, "advanced"] if self.advanced or own_weights else [kind]
        for split in ("dev", "test"):
            outfile = getattr(self, f"{split}_out")
            endings = [f"{split}-{kind}-output.txt" for kind in kinds]
            if not outfile.endswith(tuple(endings)):
                raise InputError(
                    f"--{split}_out {outfile}: the name must end in {' or '.join(endings)}, "
                    f"as in sst-{endings[0]}"
                )
        inputs = [self.train, self.dev, self.test, self.label_names, self.pretrained_model_path]
        inputs += [self.tokenizer_path or TOKENIZER_MODEL, *reads]
        if self.metrics_out is not None:
            outputs += (self.metrics_out,)
        check_outputs([self.dev_out, self.test_out, *outputs], inputs)


@dataclass(frozen=True, kw_only=True)
class CompileSettings(TaskSettings):
    """What generation, fine-tuning and pre-training share."""

    title = "generate, finetune and pretrain"
    description = None

    compile: bool = flag(
        False,
        "make a step of decoding (with --causal), or the layers in training, one compiled "
        "function; that takes seconds, or a minute, first",
    )


@dataclass(frozen=True, kw_only=True)
class TrainSettings(CompileSettings):
    """What fine-tuning and pre-training share."""

    takes_processes = True
    less_memory = (
        "lower --batch_size (and raise --grad_accum) or --max_sentence_len, or add "
        "--activation_checkpointing or --dtype bfloat16"
    )
    outlives_output = True
    title = "finetune and pretrain"
    description = None

    grad_accum: int = flag(1, "batches per step of training", low=1)
    activation_checkpointing: bool = flag(
        False, "train in less memory, for the time of one more forward pass"
    )
    plot: str | None = flag(None, "draw how it went, an SVG or PNG file")
    shard: bool = flag(
        False, "with several processes: each holds a part of the model, not a copy (FSDP2)"
    )
