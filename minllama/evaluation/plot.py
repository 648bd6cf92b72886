"""Curves of training runs, from their files of metrics.

    python -m minllama.evaluation.plot run1/metrics.jsonl run2/metrics.jsonl --out curves.svg

Reads the `metrics.jsonl` of pre-training, or a file that fine-tuning wrote with `--metrics_out`.
Needs matplotlib, and no display.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minllama.common.errors import InputError
from minllama.common.files import atomic_write, check_outputs
from minllama.common.program import run_script, script_parser
from minllama.evaluation.metrics import Records, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
# The palette of Okabe and Ito, for colour-blind readers too.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def check_picture(path: str | Path) -> None:
    """Check, before any work, that a picture can be drawn.

    Raises:
        InputError: its suffix is not in `SUFFIXES`, or matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: a picture's name ends in {' or '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            f"{path}: pictures need matplotlib; install it with `python -m pip install -r "
            "requirements-extra.txt`"
        )


def draw(runs: dict[str, Records], path: str | Path) -> None:
    """Draw the curves of training runs into a file.

    Args:
        runs: the metrics of each run, by name; all of pre-training, or all of fine-tuning.

    Raises:
        InputError: these are no such metrics.
    """
    import matplotlib as mpl

    options = {option_of(name, records) for name, records in runs.items()}
    if len(options) > 1:
        raise InputError(f"{' and '.join(sorted(options))} in one picture; draw them apart")
    draw_runs = draw_pretraining if options == {"pretrain"} else draw_finetuning
    style = {"svg.hashsalt": "minllama", "axes.prop_cycle": mpl.cycler(color=COLORS)}
    with mpl.rc_context(style):
        try:
            figure = draw_runs(runs)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{', '.join(runs)}: not the metrics of a training run") from error
        suffix = Path(path).suffix[1:].lower()
        metadata = {"Date": None} if suffix == "svg" else {}  # equal pictures are equal files
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format=suffix, metadata=metadata, dpi=150)


def steps_of(records: Records) -> Records:
    """The reports of pre-training."""
    return [record for record in records if "step" in record and "train" in record]


def epochs_of(records: Records) -> Records:
    """The epochs of fine-tuning."""
    return [r for r in records if r.get("option") == "finetune" and "epoch" in r]


def option_of(name: str, records: Records) -> str:
    """The option that wrote some metrics.

    Raises:
        InputError: no training run did.
    """
    if steps_of(records):
        return "pretrain"
    if epochs_of(records):
        return "finetune"
    raise InputError(f"{name}: no report of a training run in it; name another file")


def column(records: Records, name: str) -> list[float]:
    """A value of each record."""
    return [float(record[name]) for record in records]


def subplots(n: int) -> tuple["Figure", "Sequence[Axes]"]:
    """A figure with `n` axes beside each other. It has no window, so it needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", figsize=(12, 3.6))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, n, squeeze=False)[0]


def draw_pretraining(runs: dict[str, Records]) -> "Figure":
    """Draw loss, bits per byte and learning rate over the steps."""
    figure, (loss, bits, rate) = subplots(3)
    for i, (name, records) in enumerate(runs.items()):
        steps = steps_of(records)
        for split, style in (("train", "-"), ("validation", "--")):
            reports = [record for record in steps if split in record]
            label = split if len(runs) == 1 else f"{name}, {split}"
            for axes, value in ((loss, "loss"), (bits, "bits_per_byte")):
                values = column([record[split] for record in reports], value)
                axes.plot(column(reports, "step"), values, style, color=f"C{i}", label=label)
        rate.plot(column(steps, "step"), column(steps, "lr"), color=f"C{i}")
    loss.set(xlabel="steps", ylabel="loss (nats per token)")
    bits.set(xlabel="steps", ylabel="bits per byte")
    rate.set(xlabel="steps", ylabel="learning rate", ylim=(0, None))
    loss.legend(fontsize="small")
    return figure


def draw_finetuning(runs: dict[str, Records]) -> "Figure":
    """Draw loss and accuracies over the epochs; for a single run also dev's confusion matrix."""
    evaluations = [
        record
        for records in runs.values()
        for record in records
        if (record.get("option"), record.get("split")) == ("finetune", "dev")
    ]
    has_matrix = len(runs) == 1 and len(evaluations) > 0
    figure, (loss, accuracy, *others) = subplots(3 if has_matrix else 2)
    for i, (name, records) in enumerate(runs.items()):
        epochs = epochs_of(records)
        numbers = [epoch + 1 for epoch in column(epochs, "epoch")]
        style: dict[str, Any] = {"markersize": 4, "color": f"C{i}"}
        loss.plot(numbers, column(epochs, "train_loss"), "o-", label=name, **style)
        for split, marker in (("train", "o-"), ("dev", "s--")):
            label = split if len(runs) == 1 else f"{name}, {split}"
            if all(epoch.get(f"{split}_accuracy") is not None for epoch in epochs):
                accuracies = column(epochs, f"{split}_accuracy")
                accuracy.plot(numbers, accuracies, marker, label=label, **style)
    loss.set(xlabel="epochs", ylabel="loss of train (nats per sentence)")
    accuracy.set(xlabel="epochs", ylabel="accuracy")
    for axes in (loss, accuracy):
        axes.xaxis.get_major_locator().set_params(integer=True)
    accuracy.legend(fontsize="small")
    if len(runs) > 1:
        loss.legend(fontsize="small")
    if has_matrix:
        draw_confusion(others[0], evaluations[-1]["labels"], evaluations[-1]["confusion_matrix"])
    return figure


def draw_confusion(axes: "Axes", labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> None:
    """Draw a confusion matrix."""
    axes.imshow(matrix, cmap="Blues")
    middle = max(map(max, matrix)) / 2
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            color = "white" if count > middle else "black"
            axes.text(j, i, str(count), ha="center", va="center", color=color, fontsize="small")
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted label of dev", ylabel="true label")


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("metrics", nargs="+", metavar="METRICS.jsonl")
    parser.add_argument("--out", required=True, metavar="FILE", help="an SVG or PNG file")
    args = parser.parse_args()
    check_picture(args.out)
    check_outputs([args.out], args.metrics)
    draw({name: read_metrics(path) for name, path in run_names(args.metrics).items()}, args.out)


def run_names(paths: Sequence[str]) -> dict[str, str]:
    """Name each file after its folder if these differ, else by its path.

    Raises:
        InputError: a file is named twice.
    """
    folders = [Path(path).resolve().parent.name for path in paths]
    names = folders if len(set(folders)) == len(paths) else paths
    if len(set(names)) < len(paths):
        raise InputError(f"{', '.join(paths)}: the same file twice")
    return dict(zip(names, paths, strict=True))


if __name__ == "__main__":
    run_script(main)
