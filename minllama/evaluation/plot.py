"""Curves of training runs, from their files of metrics.

    python -m minllama.evaluation.plot run1/metrics.jsonl run2/metrics.jsonl --out curves.svg

Reads the `metrics.jsonl` of pre-training, or a file that fine-tuning wrote with `--metrics_out`.
Needs matplotlib, and no display.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minllama.common.errors import InputError, needs_package
from minllama.common.files import atomic_write, check_outputs
from minllama.common.program import run_script, script_parser
from minllama.evaluation.metrics import Records, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
# The palette of Okabe and Ito, for colour-blind readers too.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
# The panels of a picture, with the curves in each: the keys that lead to a value in a record.
Panels = dict[str, dict[str, list[str]]]
PRETRAINING: Panels = {
    "loss (nats per token)": {s: [s, "loss"] for s in ("train", "validation")},
    "bits per byte": {s: [s, "bits_per_byte"] for s in ("train", "validation")},
    "learning rate": {"learning rate": ["lr"]},
}
FINETUNING: Panels = {
    "loss (nats per sentence)": {"train": ["train_loss"]},
    "accuracy": {"train": ["train_accuracy"], "dev": ["dev_accuracy"]},
}


def check_picture(path: str | Path) -> None:
    """Check, before any work, that a picture can be drawn.

    Raises:
        InputError: its suffix is not in `SUFFIXES`, or matplotlib does not work.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: a picture's name ends in {' or '.join(SUFFIXES)}")
    with needs_package(f"drawing {path}", "matplotlib"):
        from matplotlib.figure import Figure

        Figure().savefig(io.BytesIO(), format=Path(path).suffix[1:].lower())


def draw(runs: dict[str, Records], path: str | Path) -> None:
    """Draw the curves of training runs into a file.

    Args:
        runs: the metrics of each run, by name; all of pre-training, or all of fine-tuning.

    Raises:
        InputError: these are no such metrics.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "minllama", "axes.prop_cycle": mpl.cycler(color=COLORS)}
    with mpl.rc_context(style):
        figure = Figure(layout="constrained", figsize=(12, 3.6))
        try:
            draw_runs(figure, runs)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{', '.join(runs)}: not the metrics of a training run, or of both kinds"
            ) from error
        suffix = Path(path).suffix[1:].lower()
        metadata = {"Date": None} if suffix == "svg" else {}  # equal pictures are equal files
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format=suffix, metadata=metadata, dpi=150)


def draw_runs(figure: "Figure", runs: dict[str, Records]) -> None:
    """Draw the panels side by side; for a single fine-tuning run also dev's confusion matrix."""
    every = [record for records in runs.values() for record in records]
    x, panels, confusions = "step", PRETRAINING, []
    if not any(x in record for record in every):
        x, panels = "epoch", FINETUNING
        finetuned = [record for record in every if record.get("option") == "finetune"]
        confusions = [record for record in finetuned if record.get("split") == "dev"]
    has_confusion = len(runs) == 1 and len(confusions) > 0
    axes = figure.subplots(1, len(panels) + has_confusion)
    for panel, (title, curves) in zip(axes, panels.items(), strict=False):
        for i, (name, records) in enumerate(runs.items()):
            for (curve, keys), style in zip(curves.items(), (".-", ".--"), strict=False):
                label = curve if len(runs) == 1 else f"{name}, {curve}"
                points = points_of(records, x, keys)
                if points[0]:
                    panel.plot(*points, style, color=f"C{i}", label=label)
        panel.set(xlabel=x, ylabel=title)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.legend(fontsize="small")
    if has_confusion:
        draw_confusion(axes[-1], confusions[-1]["labels"], confusions[-1]["confusion_matrix"])


def points_of(records: Records, x: str, keys: Sequence[str]) -> tuple[list[float], list[float]]:
    """The points of a curve: x and a value of each record that has them.

    Raises:
        KeyError, TypeError, ValueError: no record has x, or a value is no number.
    """
    reports = [record for record in records if x in record]
    if not reports:
        raise ValueError
    xs, ys = [], []
    for report in reports:
        if report.get(keys[0]) is not None:
            value: Any = report
            for key in keys:
                value = value[key]
            xs.append(float(report[x]))
            ys.append(float(value))
    return xs, ys


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
    draw({path: read_metrics(path) for path in args.metrics}, args.out)


if __name__ == "__main__":
    run_script(main)
