"""The rows of the report's table, in order.

Each has a name, by which its runs are recorded. Those whose names begin with "reader" start from a
domain-adapted model: the demo model after more pre-training on unlabelled film reviews. A row that
trains has one hyperparameter. It is tuned on SST-5's dev if several values are given. A single
value was the best one with the demo model of version 0.1.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from experiments.baseline import CS
from experiments.task_text import CFIMDB, LABEL_WORDS, SST, TEMPLATE

EPOCHS, BATCH_SIZES = 5, {SST: 80, CFIMDB: 10}
SEEDS = (1, 2, 3)
RATES = (2e-4, 5e-4, 1e-3)
LOW_RATES = (1e-4, 2e-4, 5e-4)
HIGH_RATES = (1e-3, 2e-3, 5e-3)
CAUSAL = {"causal": True, "dtype": "bfloat16", "lr": 5e-4}  # where no other rate is tuned
SHOTS = CAUSAL | {"shots": 64, "batch_size": 8}
MEAN = {"pooling": "mean"}
LINEAR = {"lr_schedule": "linear", "warmup": 0.1}
PROMPT = {"prompt_based": True, "prompt_template": TEMPLATE}
ALPHAS = [0, 0.2, 0.4, 0.6, 0.8, 1]
MEGABYTES = 60  # of reviews, for the domain-adapted model of most rows
OTHER_MEGABYTES = (3, 10, 30, 128)


@dataclass
class Row:
    """A way to classify, which is run on SST-5, and on CFIMDB too if `on_cfimdb`.

    Attributes:
        label: the first cell of the table.
        flags: the flags of all its runs, as `runs.arguments` or `baseline` takes them.
        tuned: its hyperparameter: a flag, or "steps" of continued pre-training.
        values: candidates for it.
        corpus: the text of continued pre-training before, "sentences" or "labelled"; None is none.
        steps_of: the row whose best number of steps that pre-training takes.
        reviews_mb: megabytes of reviews in the pre-training of its model; 0 is the demo model.
        option: "finetune", "prompt" or "baseline"; the last one tunes its hyperparameter itself.
    """

    label: str
    flags: Mapping[str, object]
    tuned: str = ""
    values: tuple = (None,)
    corpus: str | None = None
    steps_of: str | None = None
    on_cfimdb: bool = False
    reviews_mb: int = 0
    option: str = "finetune"

    @property
    def seeds(self) -> tuple:
        """The seeds of the final runs; a run that draws nothing has none."""
        return SEEDS if self.option == "finetune" or "shots" in self.flags else (None,)

    def settings(self, data: str, value: object, seed: int | None) -> dict[str, Any]:
        """All flags of a run, with the tuned one at a value."""
        flags = dict(self.flags)
        if self.option == "finetune":
            flags = {"batch_size": BATCH_SIZES[data], "epochs": EPOCHS, **flags}
            if self.tuned != "steps":
                flags[self.tuned] = value
            if data == CFIMDB:  # where float32 would take a day
                flags["dtype"] = "bfloat16"
        if seed is not None:
            flags["seed"] = seed
        if "prompt_template" in flags:
            flags["label-names"] = LABEL_WORDS[data]
        return flags


def baseline_row(label: str, reviews_mb: int = 0, **flags: object) -> Row:
    row = Row(label, flags, "C", CS, reviews_mb=reviews_mb, option="baseline")
    return replace(row, on_cfimdb="shots" not in flags)


def prompted_row(label: str, flags: Mapping[str, object]) -> Row:
    return Row(label, flags, option="prompt", on_cfimdb=True)


REFERENCE = {
    "default": Row(
        "the assignment's default: unmasked, float32 (on CFIMDB bfloat16)",
        {"no-causal": True},
        "lr",
        (2e-4,),
        on_cfimdb=True,
    ),
    "plain": Row("plain: causal, bfloat16", CAUSAL, "lr", LOW_RATES, on_cfimdb=True),
}
METHODS = {
    "continued": Row("continued pre-training", CAUSAL, "steps", (250,), "sentences"),
    "mean": Row("mean pooling", CAUSAL | MEAN, "lr", LOW_RATES, on_cfimdb=True),
    "names": Row("the head begins as the labels' names", CAUSAL | {"wise_ft": [1]}, "lr", RATES),
    "wise": Row("WiSE-FT, α of 0, 0.2 … 1, that head", CAUSAL | {"wise_ft": ALPHAS}, "lr", (2e-4,)),
    "prompt": Row("prompt-based", CAUSAL | PROMPT, "lr", (2e-4,)),
    "lora": Row("LoRA", CAUSAL | {"tune": "lora"}, "lr", (2e-3,)),
    "adapter": Row("adapters", CAUSAL | {"tune": "adapter"}, "lr", (2e-3,)),
    "prefix": Row("prefix", CAUSAL | {"tune": "prefix"}, "lr", (2e-3,)),
    "norm": Row("the norms' scales", CAUSAL | {"tune": "norm"}, "lr", (5e-3,)),
    "head": Row("the head only", CAUSAL | {"tune": "head"}, "lr", (2e-3,)),
    "mixout": Row("Mixout", CAUSAL, "mixout", (0.3,)),
    "decay": Row("layer-wise rates", CAUSAL, "layer_decay", (0.75,)),
    "schedule": Row("warm-up and linear decay", CAUSAL | LINEAR, "lr", (2e-4,)),
    "smart": Row("SMART", CAUSAL, "smart", (0.3,)),
    "labelled": Row(
        "continued pre-training with the labels, prompt-based",
        CAUSAL | PROMPT | {"lr": 2e-4},
        "steps",
        (500,),
        "labelled",
    ),
    "labelled mean": Row(
        "continued pre-training with the labels, mean pooling",
        CAUSAL | MEAN,
        "lr",
        (1e-4,),
        "labelled",
        steps_of="labelled",
        on_cfimdb=True,
    ),
    "short": Row(
        "continued pre-training, mean pooling, linear decay",
        CAUSAL | MEAN | LINEAR,
        "epochs",
        (2,),
        "sentences",
        steps_of="continued",
        on_cfimdb=True,
    ),
}


def adapted(row: Row, megabytes: int = MEGABYTES) -> Row:
    """The same row with a domain-adapted model."""
    label = f"domain-adapted, {megabytes} MB: {row.label}"
    return replace(row, label=label, reviews_mb=megabytes)


OTHER_ADAPTED = {f"reader {n} MB": adapted(METHODS["prompt"], n) for n in OTHER_MEGABYTES}
ADAPTED = {
    "reader plain": adapted(Row("plain", CAUSAL, "lr", LOW_RATES)),
    **{
        f"reader {name}": adapted(METHODS[name])
        for name in ("mean", "lora", "prompt", "labelled mean", "short")
    },
    **OTHER_ADAPTED,
}
FEW_SHOT = {
    "few": Row("64 sentences a label: plain", SHOTS, "lr", (2e-4,)),
    "few prompt": Row("64 sentences a label: prompt-based", SHOTS | PROMPT, "lr", (2e-4,)),
    "few lora": Row("64 sentences a label: LoRA", SHOTS | {"tune": "lora"}, "lr", HIGH_RATES),
}
FEW_SHOT["reader few prompt"] = adapted(FEW_SHOT["few prompt"])

TF_IDF = "TF-IDF, logistic regression"
ZERO_SHOT = {"causal": True, "batch_size": 10}
IT_WAS = ZERO_SHOT | {"prompt_template": TEMPLATE}
PROMPTED = {
    "zero-shot": prompted_row("zero-shot, the assignment's prompt", ZERO_SHOT),
    "zero-shot ours": prompted_row("zero-shot, “It was”", IT_WAS),
    "zero-shot calibrated": prompted_row(
        "zero-shot, “It was”, contextual calibration", IT_WAS | {"calibrate": "contextual"}
    ),
    "zero-shot pmi": prompted_row("zero-shot, “It was”, PMI", IT_WAS | {"calibrate": "pmi"}),
}
PROMPTED |= {f"reader {name}": adapted(row) for name, row in PROMPTED.items()}

ROWS = {
    **REFERENCE,
    "tf-idf": baseline_row(TF_IDF),
    **METHODS,
    "reader tf-idf": baseline_row(
        f"{TF_IDF}, and a truncated SVD of the reviews", reviews_mb=MEGABYTES
    ),
    **ADAPTED,
    **FEW_SHOT,
    "few tf-idf": baseline_row(f"64 sentences a label: {TF_IDF}", shots=64),
    **PROMPTED,
}
CURVE = sorted(["prompt", *OTHER_ADAPTED, "reader prompt"], key=lambda name: ROWS[name].reviews_mb)
