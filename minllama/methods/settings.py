"""The settings of fine-tuning: its flags, those of methods, and those of a saved run."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from minllama import methods
from minllama.checkpoints.formats import find_tokenizer
from minllama.common.errors import InputError, missing_file
from minllama.common.files import file_fingerprint
from minllama.common.flags import DEMO_DATA, DEMO_MODEL, ClassifySettings, TrainSettings
from minllama.common.settings import flag, values_of
from minllama.evaluation.metrics import check_metrics_file
from minllama.evaluation.plot import check_picture
from minllama.methods.base import Method
from minllama.methods.saved import read_classifier

# The files that the result depends on, and the settings, besides those of methods.
FINGERPRINT_FILES = (
    "train", "dev", "test", "label_names", "pretrained_model_path", "tokenizer_path"
)  # fmt: skip
FINGERPRINT = (
    "option", "causal", "dtype", "max_sentence_len", "seed", "batch_size", "epochs", "lr",
    "hidden_dropout_prob", "grad_accum", "skip_train_eval",
)  # fmt: skip
# The flags that `--load` takes from the saved run if they are not given.
OVERRIDABLE = (*FINGERPRINT_FILES, "dtype", "batch_size")
UNUSED_WITH_LOAD = {
    "save_every", "fresh", "grad_accum", "activation_checkpointing", "skip_train_eval", "compile",
    "plot", "shard",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TrainSettings, ClassifySettings):
    """The flags of fine-tuning.

    Attributes:
        methods: the methods that are on.
        filepath: the file for the best weights.
    """

    title = "finetune"

    tune: str = flag(
        "full",
        "pretrained weights to train besides the new head (arXiv 2110.04366)",
        choices=methods.TUNE_CHOICES,
    )
    skip_train_eval: bool = flag(False, "do not evaluate the training set after every epoch")
    load: str | None = flag(
        None,
        "saved classifier to evaluate (finetune) or label with (predict)",
        metavar="CHECKPOINT",
    )
    save_every: int | None = flag(None, "also save the run's state every N optimizer steps", low=1)
    fresh: bool = flag(False, "train again, even if the same run was interrupted or is finished")
    methods: tuple[Method, ...] = ()
    filepath: str = ""

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Build the settings from any object with some flags, of methods too, as attributes.

        Labels have no names then, unless a method needs them, as in the assignment.
        """
        if isinstance(args, cls):
            return args
        values = values_of(args, [*cls.defaults(), *methods.flag_values(()), "filepath"])
        values.pop("load", None)
        settings = cls.from_flags({"option": cls.title} | values)
        explicit = tuple(name for name in settings.explicit if name != "label_names")
        return settings.replace(explicit=explicit).resolved()

    @classmethod
    def from_flags(cls, values: dict[str, Any]) -> Self:
        """Build the settings from flags; with `load`, missing flags take the saved run's values."""
        explicit = tuple(sorted(values))
        if values.get("load") is not None:
            values = cls.from_saved_run(values)
        fields = cls.select_fields(values) | {"methods": methods.active_methods(values)}
        return cls(**fields, explicit=explicit)

    @classmethod
    def from_saved_run(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Complete flags that have `load` by those of the saved run.

        Raises:
            InputError: a flag would change the classifier, or would not act.
        """
        if unused := UNUSED_WITH_LOAD.intersection(values):
            raise InputError(f"--{min(unused)}: --load trains nothing; leave it out")
        saved, config = read_classifier(values["load"])
        args = saved["args"]
        fixed = {"max_sentence_len": args.get("max_sentence_len"), "causal": config.causal}
        fixed |= methods.flag_values(config.methods)
        for name, value in fixed.items():
            if name in values and values[name] != value:
                raise InputError(
                    f"{values['load']}: trained with {name} {value}; leave the flag out"
                )
        return {name: args[name] for name in OVERRIDABLE if name in args} | fixed | values

    def resolved(self) -> Self:
        """Fill in demo files, the tokenizer, and the names of outputs."""
        settings = self if self.load is not None else self.with_demo(DEMO_MODEL, DEMO_DATA)
        suffix = methods.file_suffix(self.methods)
        return settings.replace(
            tokenizer_path=settings.tokenizer_path
            or find_tokenizer(settings.pretrained_model_path),
            filepath=self.load or self.filepath or f"finetune-{self.epochs}-{self.lr}{suffix}.pt",
        ).with_output_names("finetuning")

    def to_dict(self) -> dict[str, Any]:
        """All values, including the flags of methods."""
        values = super().to_dict()
        del values["methods"]
        return values | methods.flag_values(self.methods)

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that the result depends on, as JSON values: settings, and the content of files."""
        values = {name: value for name, value in self.to_dict().items() if name in FINGERPRINT}
        values |= methods.flag_values(self.methods)
        paths = {name: getattr(self, name) for name in FINGERPRINT_FILES}
        if not self.reads_label_names:
            del paths["label_names"]
        values |= {n: file_fingerprint(path) for n, path in paths.items() if Path(path).exists()}
        return json.loads(json.dumps(values))

    @property
    def reads_label_names(self) -> bool:
        """Whether the names of the labels were asked for, or a method needs them."""
        return "label_names" in self.explicit or any(m.needs_label_names for m in self.methods)

    @property
    def is_advanced(self) -> bool:
        return bool(methods.changed_values(self.methods))

    def check(self) -> None:
        """Check, before any work, that the flags describe a run whose results can be written.

        Raises:
            InputError: they do not.
            FileNotFoundError: a file is absent.
        """
        for method in self.methods:
            if self.shard and not method.shardable:
                raise InputError(
                    f"--shard: cannot be combined with {method.spelled()}; leave one of them out"
                )
        outputs = [path for path in (self.plot, None if self.load else self.filepath) if path]
        own_weights = "pretrained_model_path" in self.explicit or self.load is not None
        self.check_output_names(
            "finetuning", own_weights, outputs, [self.load] if self.load else []
        )
        check_metrics_file(self.metrics_out)
        if self.plot is not None:
            check_picture(self.plot)
        for path in (self.train, self.dev, self.test, self.pretrained_model_path):
            if self.load is None and not Path(path).exists():
                raise missing_file(path)
