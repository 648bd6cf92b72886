"""What the report compares: the rows of its table, in order, each with a name.

A row that trains has one hyperparameter that is tuned. Most rows take the value that was best with
the demo model of version 0.1.0 on SST-5's dev, of those that are listed. The reader's rows without
a tuning of their own take that of the same method with the demo model.
"""

from dataclasses import dataclass, field, replace

from experiments.task_text import CFIMDB, LABEL_WORDS, SST, TEMPLATE

EPOCHS, BATCH_SIZES = 5, {SST: 80, CFIMDB: 10}
RATES = (2e-4, 5e-4, 1e-3)
LOW_RATES = (1e-4, 2e-4, 5e-4)
HIGH_RATES = (1e-3, 2e-3, 5e-3)
CAUSAL = {"causal": True, "dtype": "bfloat16", "lr": 5e-4}  # where no other is tuned
SHOTS = CAUSAL | {"shots": 64, "batch_size": 8}
MEAN = {"pooling": "mean"}
LINEAR = {"lr_schedule": "linear", "warmup": 0.1}
PROMPT = {"prompt_based": True, "prompt_template": TEMPLATE}
ALPHAS = [0, 0.2, 0.4, 0.6, 0.8, 1]
MEGABYTES = 60  # of reviews that the reader has read
OTHER_MEGABYTES = (3, 10, 30, 128)


@dataclass
class Row:
    """What is fine-tuned.

    Attributes:
        label: what the table calls it.
        flags: of all its runs, as `runs.run_llama` takes them.
        tuned: the flag that is tuned, or "steps" of continued pre-training.
        values: what is tried for it.
        kept: the one of them that is taken without tuning; None if it is to be found.
        corpus: the text on which pre-training is continued before, "sentences" or "labelled"; None
            for no such pre-training.
        steps_of: the row whose best number of steps that pre-training takes.
        on_cfimdb: whether it runs there too.
        cfimdb_flags: flags that are added there.
        reviews_mb: megabytes of unlabelled reviews that its model has read; 0 is the demo model.
    """

    label: str
    flags: dict[str, object]
    tuned: str
    values: tuple
    kept: object | None = None
    corpus: str | None = None
    steps_of: str | None = None
    on_cfimdb: bool = False
    cfimdb_flags: dict[str, object] = field(default_factory=dict)
    reviews_mb: int = 0

    def settings(self, data: str, value: object, seed: int) -> dict:
        """All flags of a run, with the tuned one at a value."""
        own = {} if self.tuned == "steps" else {self.tuned: value}
        own |= self.cfimdb_flags if data == CFIMDB else {}
        common = {"batch_size": BATCH_SIZES[data], "epochs": EPOCHS}
        return with_label_words(common | self.flags | own | {"seed": seed}, data)


@dataclass
class Baseline:
    """TF-IDF and logistic regression: what a sceptic would use.

    Attributes:
        label: what the table calls it.
        shots: sentences of each label that it sees. None: all of them, and it runs on CFIMDB too.
        reviews_mb: megabytes of unlabelled reviews that it has read; see `baseline`.
    """

    label: str
    shots: int | None = None
    reviews_mb: int = 0


@dataclass
class Prompted:
    """A model that is asked and does not learn.

    Attributes:
        label: what the table calls it.
        flags: as `runs.run_llama` takes them.
        reviews_mb: see `Row`.
    """

    label: str
    flags: dict[str, object]
    reviews_mb: int = 0


REFERENCE = {
    "default": Row(
        "the assignment's default: unmasked, float32 (on CFIMDB bfloat16)",
        {"no-causal": True},
        "lr",
        RATES,
        kept=2e-4,
        on_cfimdb=True,
        cfimdb_flags={"dtype": "bfloat16"},
    ),
    "plain": Row("plain: causal, bfloat16", CAUSAL, "lr", LOW_RATES, on_cfimdb=True),
}
METHODS = {
    "continued": Row(
        "continued pre-training", CAUSAL, "steps", (250, 500, 1000), kept=250, corpus="sentences"
    ),
    "mean": Row("mean pooling", CAUSAL | MEAN, "lr", LOW_RATES, on_cfimdb=True),
    "names": Row("the head begins as the labels' names", CAUSAL | {"wise_ft": [1]}, "lr", RATES),
    "wise": Row(
        # It trains as the row above does, whose best rate this is.
        "WiSE-FT, α of 0, 0.2 … 1, that head",
        CAUSAL | {"wise_ft": ALPHAS},
        "lr",
        RATES,
        kept=2e-4,
    ),
    "prompt": Row("prompt-based", CAUSAL | PROMPT, "lr", RATES, kept=2e-4),
    "lora": Row("LoRA", CAUSAL | {"tune": "lora"}, "lr", HIGH_RATES, kept=2e-3),
    "adapter": Row("adapters", CAUSAL | {"tune": "adapter"}, "lr", HIGH_RATES, kept=2e-3),
    "prefix": Row("prefix", CAUSAL | {"tune": "prefix"}, "lr", (2e-3, 5e-3, 1e-2), kept=2e-3),
    "norm": Row(
        "the norms' scales", CAUSAL | {"tune": "norm"}, "lr", (2e-3, 5e-3, 1e-2), kept=5e-3
    ),
    "head": Row("the head only", CAUSAL | {"tune": "head"}, "lr", (2e-3, 1e-2, 5e-2), kept=2e-3),
    "mixout": Row("Mixout", CAUSAL, "mixout", (0.1, 0.3, 0.6), kept=0.3),
    "decay": Row("layer-wise rates", CAUSAL, "layer_decay", (0.6, 0.75, 0.9), kept=0.75),
    "schedule": Row("warm-up and linear decay", CAUSAL | LINEAR, "lr", RATES, kept=2e-4),
    "smart": Row("SMART", CAUSAL, "smart", (0.3,), kept=0.3),
    "labelled": Row(
        "continued pre-training with the labels, prompt-based",
        CAUSAL | PROMPT | {"lr": 2e-4},
        "steps",
        (250, 500, 1000),
        kept=500,
        corpus="labelled",
    ),
    "labelled mean": Row(
        "continued pre-training with the labels, mean pooling",
        CAUSAL | MEAN,
        "lr",
        LOW_RATES,
        kept=1e-4,
        corpus="labelled",
        steps_of="labelled",
        on_cfimdb=True,
    ),
    "short": Row(
        "continued pre-training, mean pooling, linear decay",
        CAUSAL | MEAN | LINEAR,
        "epochs",
        (1, 2, 3),
        kept=2,
        corpus="sentences",
        steps_of="continued",
        on_cfimdb=True,
    ),
}
READER = {
    "reader plain": Row("the reader: plain", CAUSAL, "lr", LOW_RATES, reviews_mb=MEGABYTES),
} | {
    f"reader {name}": replace(
        METHODS[name], label=f"the reader: {METHODS[name].label}", reviews_mb=MEGABYTES
    )
    for name in ("mean", "lora", "prompt", "labelled mean", "short")
}
OTHER_READERS = {
    f"reader {n} MB": replace(
        READER["reader prompt"], label=f"a reader of {n} MB: prompt-based", reviews_mb=n
    )
    for n in OTHER_MEGABYTES
}
FEW_SHOT = {
    "few": Row("64 sentences a label: plain", SHOTS, "lr", RATES, kept=2e-4),
    "few prompt": Row("64 sentences a label: prompt-based", SHOTS | PROMPT, "lr", RATES, kept=2e-4),
    "few lora": Row("64 sentences a label: LoRA", SHOTS | {"tune": "lora"}, "lr", HIGH_RATES),
}
FEW_SHOT["reader few prompt"] = replace(
    FEW_SHOT["few prompt"],
    label="64 sentences a label: the reader, prompt-based",
    reviews_mb=MEGABYTES,
)
ROWS = REFERENCE | METHODS | READER | OTHER_READERS | FEW_SHOT
CURVE = sorted(["prompt", *OTHER_READERS, "reader prompt"], key=lambda name: ROWS[name].reviews_mb)

TF_IDF = "TF-IDF, logistic regression"
BASELINES = {
    "tf-idf": Baseline(TF_IDF),
    "reader tf-idf": Baseline(
        f"{TF_IDF}, and a truncated SVD of the reviews", reviews_mb=MEGABYTES
    ),
    "few tf-idf": Baseline(f"64 sentences a label: {TF_IDF}", SHOTS["shots"]),
}
ASK = {"causal": True, "batch_size": 10}
ASK_OURS = ASK | {"prompt_template": TEMPLATE}
PROMPTS = {
    "zero-shot": ("zero-shot, the assignment's prompt", ASK),
    "zero-shot ours": ("zero-shot, “It was”", ASK_OURS),
    "zero-shot calibrated": (
        "zero-shot, “It was”, contextual calibration",
        ASK_OURS | {"calibrate": "contextual"},
    ),
    "zero-shot pmi": ("zero-shot, “It was”, PMI", ASK_OURS | {"calibrate": "pmi"}),
}
PROMPTED = {name: Prompted(label, flags) for name, (label, flags) in PROMPTS.items()} | {
    f"reader {name}": Prompted(f"the reader: {label}", flags, MEGABYTES)
    for name, (label, flags) in PROMPTS.items()
}
TABLE: dict[str, Row | Baseline | Prompted] = {
    **REFERENCE,
    "tf-idf": BASELINES["tf-idf"],
    **METHODS,
    "reader tf-idf": BASELINES["reader tf-idf"],
    **READER,
    **OTHER_READERS,
    **FEW_SHOT,
    "few tf-idf": BASELINES["few tf-idf"],
    **PROMPTED,
}


def with_label_words(flags: dict[str, object], data: str) -> dict[str, object]:
    """Our template's flags, completed by the labels that go with it."""
    return flags | ({"label-names": LABEL_WORDS[data]} if "prompt_template" in flags else {})
