"""The pictures of `experiments/report.py`, SVG files."""

from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from minllama.common.files import atomic_write

STYLE = {"fmt": "o", "markersize": 4, "linewidth": 0.8, "capsize": 2, "color": "C0"}
plt.rcParams["svg.hashsalt"] = "minllama"  # the same picture is the same file


def draw_methods(
    rows: dict[str, tuple[int | None, list[float]]], line: tuple[str, float], path: Path
) -> None:
    """Draw accuracy by trained parameters; below, the rows that train (almost) all, by accuracy.

    Args:
        rows: trained parameters and accuracies by label; diverged rows are left out.
        line: label and accuracy of a vertical line.
    """
    measured = {label: (row[0], row[1]) for label, row in rows.items() if row[0] and row[1]}
    everything = max(trained for trained, _ in measured.values())
    figure, (upper, lower) = plt.subplots(
        nrows=2, sharex=True, height_ratios=(2, 3), figsize=(9, 7), layout="constrained"
    )
    for label, (trained, values) in sorted(measured.items(), key=lambda row: mean(row[1][1])):
        accuracy = mean(values)
        deviation = stdev(values) if len(values) > 1 else None
        if trained > 0.9 * everything:
            lower.errorbar(accuracy, label, xerr=deviation, **STYLE)
        else:
            upper.errorbar(accuracy, trained, xerr=deviation, **STYLE)
            upper.annotate(label, (accuracy, trained), (5, 5), textcoords="offset points")
    for axes in (upper, lower):
        axes.axvline(line[1], linestyle="--", color="grey", label=line[0])
    upper.set(yscale="log", ylabel="trained parameters")
    upper.margins(y=0.3)
    upper.legend()
    lower.set(ylabel=f"all of the {everything:,}", xlabel="accuracy on SST-5's dev")
    save(figure, path)


def draw_curve(
    points: dict[int, dict[str, list[float]]], lines: dict[str, float], path: Path
) -> None:
    """Draw accuracy by the amount of text in pre-training.

    Args:
        points: accuracies by split, by megabytes; those without accuracies are left out.
        lines: accuracy of TF-IDF by split, for a dashed line.
    """
    points = {megabytes: point for megabytes, point in points.items() if all(point.values())}
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, (split, line) in enumerate(lines.items()):
        values = [point[split] for point in points.values()]
        style = STYLE | {"fmt": "o-", "color": f"C{i}"}
        deviations = [stdev(v) if len(v) > 1 else 0 for v in values]
        axes.errorbar(
            list(map(str, points)), list(map(mean, values)), yerr=deviations, label=split, **style
        )
        axes.axhline(line, linestyle="--", color=f"C{i}", label=f"TF-IDF, {split}")
    axes.set(xlabel="MB of film reviews read before", ylabel="accuracy on SST-5")
    axes.legend()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
