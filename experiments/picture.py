"""The pictures of `experiments/report.py`, SVG files."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from minllama.common.files import atomic_write

STYLE = {"fmt": "o", "markersize": 4, "linewidth": 0.8, "capsize": 2, "color": "C0"}
plt.rcParams["svg.hashsalt"] = "minllama"  # the same picture is the same file


def draw_methods(
    rows: dict[str, tuple[int, list[float]]], line: tuple[str, float], path: Path
) -> None:
    """Draw accuracy by trained parameters; below, the rows that train (almost) all, by accuracy.

    Args:
        rows: trained parameters and accuracies by label.
        line: label and accuracy of a vertical line.
    """
    everything = max(trained for trained, _ in rows.values())
    figure, (upper, lower) = plt.subplots(
        nrows=2, sharex=True, height_ratios=(2, 3), figsize=(9, 7), layout="constrained"
    )
    for label, (trained, values) in sorted(rows.items(), key=lambda row: np.mean(row[1][1])):
        accuracy, deviation = np.mean(values), np.std(values, ddof=1)
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
        points: accuracies by split, by megabytes.
        lines: accuracy of TF-IDF by split, for a dashed line.
    """
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    megabytes = list(map(str, points))
    for i, (split, line) in enumerate(lines.items()):
        values = [point[split] for point in points.values()]  # of each seed
        deviations = [np.std(each, ddof=1) for each in values]
        style = STYLE | {"fmt": "o-", "color": f"C{i}", "label": split}
        axes.errorbar(megabytes, [np.mean(each) for each in values], yerr=deviations, **style)
        axes.axhline(line, linestyle="--", color=f"C{i}", label=f"TF-IDF, {split}")
    axes.set(xlabel="MB of film reviews read before", ylabel="accuracy on SST-5")
    axes.legend()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
