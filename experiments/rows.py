"""What the report compares: rows of flags, each with the one hyperparameter that is tuned."""

from dataclasses import dataclass, field

from experiments.task_text import CFIMDB, LABEL_WORDS, SST, TEMPLATE

EPOCHS, BATCH_SIZES = 5, {SST: 80, CFIMDB: 10}
RATES = (2e-4, 5e-4, 1e-3)
HIGH_RATES = (1e-3, 2e-3, 5e-3)
CAUSAL = {"causal": True, "dtype": "bfloat16", "lr": 5e-4}  # the rate that is plain's best
SHOTS = CAUSAL | {"shots": 64, "batch_size": 8}
LINEAR = {"lr_schedule": "linear", "warmup": 0.1}
PROMPT = {"prompt_based": True, "prompt_template": TEMPLATE}
ALPHAS = [0, 0.2, 0.4, 0.6, 0.8, 1]
ZERO_SHOT = {"causal": True, "batch_size": 10}
ZERO_SHOT_OURS = ZERO_SHOT | {"prompt_template": TEMPLATE}


@dataclass
class Row:
    """One row of the table.

    Attributes:
        label: what the table calls it.
        flags: of all its runs, as `runs.run_llama` takes them.
        tuned: the flag that is tuned, or "steps" of continued pre-training.
        values: what is tried for it.
        corpus: the text on which pre-training is continued before, "sentences" or "labelled"; None
            for no such pre-training.
        steps_of: the row whose best number of steps that pre-training takes.
        on_cfimdb: flags that are added there.
    """

    label: str
    flags: dict[str, object]
    tuned: str
    values: tuple
    corpus: str | None = None
    steps_of: str | None = None
    on_cfimdb: dict[str, object] = field(default_factory=dict)

    def settings(self, data: str, value: object, seed: int) -> dict:
        """All flags of a run, with the tuned one at a value."""
        own = {} if self.tuned == "steps" else {self.tuned: value}
        own |= self.on_cfimdb if data == CFIMDB else {}
        common = {"batch_size": BATCH_SIZES[data], "epochs": EPOCHS}
        return with_label_words(common | self.flags | own | {"seed": seed}, data)


REFERENCE = {
    "default": Row(
        "the assignment's default: unmasked, float32 (on CFIMDB bfloat16)",
        {"no-causal": True},
        "lr",
        RATES,
        on_cfimdb={"dtype": "bfloat16"},
    ),
    "plain": Row("plain: causal, bfloat16", CAUSAL, "lr", RATES),
}
METHODS = {
    "continued": Row("continued pre-training", CAUSAL, "steps", (250, 500, 1000), "sentences"),
    "mean": Row("mean pooling", CAUSAL | {"pooling": "mean"}, "lr", RATES),
    "names": Row("the head begins as the labels' names", CAUSAL | {"wise_ft": [1]}, "lr", RATES),
    "wise": Row("WiSE-FT, α of 0, 0.2 … 1, that head", CAUSAL | {"wise_ft": ALPHAS}, "lr", RATES),
    "prompt": Row("prompt-based", CAUSAL | PROMPT, "lr", RATES),
    "lora": Row("LoRA", CAUSAL | {"tune": "lora"}, "lr", HIGH_RATES),
    "adapter": Row("adapters", CAUSAL | {"tune": "adapter"}, "lr", HIGH_RATES),
    "prefix": Row("prefix", CAUSAL | {"tune": "prefix"}, "lr", (2e-3, 5e-3, 1e-2)),
    "norm": Row("the norms' scales", CAUSAL | {"tune": "norm"}, "lr", (2e-3, 5e-3, 1e-2)),
    "head": Row("the head only", CAUSAL | {"tune": "head"}, "lr", (2e-3, 1e-2, 5e-2)),
    "mixout": Row("Mixout", CAUSAL, "mixout", (0.1, 0.3, 0.6)),
    "decay": Row("layer-wise rates", CAUSAL, "layer_decay", (0.6, 0.75, 0.9)),
    "schedule": Row("warm-up and linear decay", CAUSAL | LINEAR, "lr", RATES),
    "smart": Row("SMART", CAUSAL, "smart", (0.3,)),
    "labelled": Row(
        "continued pre-training with the labels, prompt-based",
        CAUSAL | PROMPT | {"lr": 2e-4},
        "steps",
        (250, 500, 1000),
        "labelled",
    ),
    "labelled mean": Row(
        "continued pre-training with the labels, mean pooling",
        CAUSAL | {"pooling": "mean"},
        "lr",
        (1e-4, 2e-4, 5e-4),
        "labelled",
        steps_of="labelled",
    ),
    "short": Row(
        "continued pre-training, mean pooling, linear decay",
        CAUSAL | {"pooling": "mean"} | LINEAR,
        "epochs",
        (1, 2, 3),
        "sentences",
        steps_of="continued",
    ),
}
FEW_SHOT = {
    "few": Row("64 sentences a label: plain", SHOTS, "lr", RATES),
    "few prompt": Row("64 sentences a label: prompt-based", SHOTS | PROMPT, "lr", RATES),
    "few lora": Row("64 sentences a label: LoRA", SHOTS | {"tune": "lora"}, "lr", HIGH_RATES),
}
ROWS = REFERENCE | METHODS | FEW_SHOT
PROMPTS = {
    "zero-shot, the assignment's prompt": ZERO_SHOT,
    "zero-shot, “It was”": ZERO_SHOT_OURS,
    "zero-shot, “It was”, contextual calibration": ZERO_SHOT_OURS | {"calibrate": "contextual"},
    "zero-shot, “It was”, PMI": ZERO_SHOT_OURS | {"calibrate": "pmi"},
}
BASELINE = "TF-IDF, logistic regression"


def with_label_words(flags: dict[str, object], data: str) -> dict[str, object]:
    """Our template's flags, completed by the labels that go with it."""
    return flags | ({"label-names": LABEL_WORDS[data]} if "prompt_template" in flags else {})
