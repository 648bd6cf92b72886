"""Pictures of trainings, from their files of metrics.

    python -m minllama.evaluation.plot run1/metrics.jsonl run2/metrics.jsonl --out curves.svg

What `--option pretrain` leaves in its folder, or what `--metrics_out` of fine-tuning adds lines to.
The suffix of the picture tells its format. Without a display it works too. Needs matplotlib.
"""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minllama.common.errors import InputError, missing_file
from minllama.common.files import atomic_write, check_outputs
from minllama.common.program import ArgumentParser, run_script

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
# Okabe and Ito's colours, which people who see few colours tell apart.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]

Records = list[dict[str, Any]]


def check_picture(path: str | Path) -> None:
    """See, before any work, that a picture of this name can be drawn.

    Raises:
        InputError: its suffix is another than `SUFFIXES`, or matplotlib is not there.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: a picture's name ends in {' or '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            f"{path}: pictures need matplotlib; install it with `python -m pip install -r "
            "requirements-extra.txt`"
        )


def draw(runs: dict[str, Records], path: str | Path) -> None:
    """Draw the curves of some trainings into a file.

    Args:
        runs: by name the lines of their metrics, all of one option.

    Raises:
        InputError: there is nothing to draw, or there are lines of several options.
    """
    import matplotlib as mpl

    kinds = {kind_of(name, records) for name, records in runs.items()}
    if len(kinds) > 1:
        raise InputError(f"{' and '.join(sorted(kinds))} in one picture; draw them apart")
    style = {"svg.hashsalt": "minllama", "axes.prop_cycle": mpl.cycler(color=COLORS)}
    with mpl.rc_context(style):
        figure = {"pretrain": draw_pretraining, "finetune": draw_finetuning}[kinds.pop()](runs)
        suffix = Path(path).suffix[1:].lower()
        metadata = {"Date": None} if suffix == "svg" else {}  # the same picture is the same file
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format=suffix, metadata=metadata, dpi=150)


def kind_of(name: str, records: Records) -> str:
    """The option that wrote some lines.

    Raises:
        InputError: none did.
    """
    for record in records:
        if "step" in record and "train" in record:
            return "pretrain"
        if record.get("option") == "finetune" and "epoch" in record:
            return "finetune"
    raise InputError(f"{name}: no report of a training in it; name another file")


def check(record: dict[str, Any], where: str) -> None:
    """See that what is drawn of a line is there.

    Raises:
        InputError: it is not what a training writes.
    """
    wanted: list[Any] = []
    if "step" in record and "train" in record:
        parts = [record[part] for part in ("train", "validation") if part in record]
        parts = [part if isinstance(part, dict) else {} for part in parts]
        wanted = [record["step"], record.get("lr")]
        wanted += [part.get(key) for part in parts for key in ("loss", "bits_per_byte")]
    elif record.get("option") == "finetune" and "epoch" in record:
        wanted = [record["epoch"], record.get("train_loss"), record.get("dev_accuracy")]
        if record.get("train_accuracy") is not None:
            wanted.append(record["train_accuracy"])
    has_matrix = "confusion_matrix" not in record or is_square(
        record["confusion_matrix"], record.get("labels")
    )
    if not (has_matrix and all(map(is_number, wanted))):
        raise InputError(f"{where}: not what a training writes")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_square(matrix: Any, labels: Any) -> bool:
    """Whether a matrix has a row and a column of numbers for each of some labels."""
    if not (isinstance(matrix, list) and isinstance(labels, list) and labels):
        return False
    return len(matrix) == len(labels) and all(
        isinstance(row, list) and len(row) == len(labels) and all(map(is_number, row))
        for row in matrix
    )


def subplots(n: int, **options: Any) -> tuple["Figure", "Sequence[Axes]"]:
    """A figure and its axes. It has no window, so that it needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **options)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, n, squeeze=False)[0]


def draw_pretraining(runs: dict[str, Records]) -> "Figure":
    """Loss, bits per byte and learning rate over the steps."""
    figure, (loss, bits, rate) = subplots(3, figsize=(12, 3.6))
    for i, (name, records) in enumerate(runs.items()):
        records = [record for record in records if "step" in record and "train" in record]
        for part, style in (("train", "-"), ("validation", "--")):
            there = [record for record in records if part in record]
            steps = [record["step"] for record in there]
            label = part if len(runs) == 1 else f"{name}, {part}"
            for axes, key in ((loss, "loss"), (bits, "bits_per_byte")):
                values = [record[part][key] for record in there]
                axes.plot(steps, values, style, color=COLORS[i % len(COLORS)], label=label)
        rates = [record["lr"] for record in records]
        rate.plot([record["step"] for record in records], rates, color=COLORS[i % len(COLORS)])
    loss.set(xlabel="steps", ylabel="loss (nats per token)")
    bits.set(xlabel="steps", ylabel="bits per byte")
    rate.set(xlabel="steps", ylabel="learning rate", ylim=(0, None))
    loss.legend(fontsize="small")
    return figure


def draw_finetuning(runs: dict[str, Records]) -> "Figure":
    """Loss and accuracies by epoch; of a single run also the confusion matrix of dev."""
    last = next(reversed(runs.values()))
    matrices = [
        record
        for record in last
        if len(runs) == 1
        and (record.get("option"), record.get("split")) == ("finetune", "dev")
        and "confusion_matrix" in record
    ]
    figure, (loss, accuracy, *more) = subplots(2 + bool(matrices), figsize=(12, 3.6))
    for i, (name, records) in enumerate(runs.items()):
        epochs = [r for r in records if r.get("option") == "finetune" and "epoch" in r]
        numbers = [record["epoch"] + 1 for record in epochs]
        color = COLORS[i % len(COLORS)]
        shown = "" if len(runs) == 1 else f"{name}, "
        losses = [record["train_loss"] for record in epochs]
        loss.plot(numbers, losses, "o-", markersize=4, color=color, label=name)
        for split, style in (("train", "o-"), ("dev", "s--")):
            values = [record.get(f"{split}_accuracy") for record in epochs]
            if None not in values:
                label = f"{shown}{split}"
                accuracy.plot(numbers, values, style, markersize=4, color=color, label=label)
    loss.set(xlabel="epochs", ylabel="loss of train (nats per sentence)")
    accuracy.set(xlabel="epochs", ylabel="accuracy")
    for axes in (loss, accuracy):
        axes.xaxis.get_major_locator().set_params(integer=True)
    accuracy.legend(fontsize="small")
    if len(runs) > 1:
        loss.legend(fontsize="small")
    if matrices:
        draw_confusion(more[0], matrices[-1]["labels"], matrices[-1]["confusion_matrix"])
    return figure


def draw_confusion(axes: "Axes", labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> None:
    """How many sentences of each label were taken for which."""
    axes.imshow(matrix, cmap="Blues")
    middle = max(map(max, matrix)) / 2
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            color = "white" if count > middle else "black"
            axes.text(j, i, str(count), ha="center", va="center", color=color, fontsize="small")
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted label of dev", ylabel="true label")


def read_metrics(path: str | Path) -> Records:
    """The lines of a file of metrics; of several fine-tunings in one file the last one's.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: a line is not what a training writes.
    """
    if not Path(path).is_file():
        raise missing_file(path)
    records: Records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: no line of metrics") from error
        check(record, f"{path}, line {number}")
        if record.get("epoch") == 0:
            records = []
        records.append(record)
    return records


def main() -> None:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", nargs="+", metavar="METRICS.jsonl")
    parser.add_argument("--out", required=True, metavar="FILE", help="an SVG or PNG file")
    args = parser.parse_args()
    check_picture(args.out)
    check_outputs([args.out], args.metrics)
    runs = {name: read_metrics(path) for name, path in names_of(args.metrics).items()}
    draw(runs, args.out)


def names_of(paths: Sequence[str]) -> dict[str, str]:
    """Names for files: their folders' where these differ, else theirs."""
    for names in ([Path(path).resolve().parent.name for path in paths], map(str, paths)):
        named = dict(zip(names, paths, strict=True))
        if len(named) == len(paths):
            return named
    raise InputError(f"{', '.join(paths)}: the same file twice")


if __name__ == "__main__":
    run_script(main)
