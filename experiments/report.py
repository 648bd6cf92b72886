"""What the methods are worth: the demo model on SST-5 and CFIMDB, in one table and two pictures.

    .venv/bin/python -m pip install -r benchmarks/requirements.txt
    .venv/bin/python -m experiments.report

Each row has one hyperparameter. In some rows it is tuned on SST-5's dev with one seed; the others
take a fixed value. Then each row runs with three other seeds. Some rows run on CFIMDB too, with the
same value. For the time, the methods take turns in training on a part of SST-5, twice; that needs
an idle machine. Every run is a process. Ctrl-C or `kill` ends the report with the run under way:
what `experiments/results/methods.jsonl` has does not run again, only checkpoints that it needs are
made again. `--rows NAME …` makes the table of these rows alone, without times and without the
picture of the methods.

    .venv/bin/python -m experiments.report --rows plain "reader plain" "reader mean"

The rows whose names begin with "reader" are of a model, and of TF-IDF, that have read film reviews
without labels. docs/pretraining.md says how their text is made. Where it is absent, and a row is
not recorded, that row is left out. The second picture shows what more reviews are worth. It is
drawn where the rows of readers of all sizes are in the table.
"""

import itertools
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from statistics import median_low

from experiments.baseline import CS
from experiments.measure import (
    RECORDS,
    SEEDS,
    NoReviews,
    final_runs,
    measured,
    relative_times,
    run_baseline,
    run_prompted,
    tuned_value,
)
from experiments.rows import BASELINES, CURVE, METHODS, PROMPTED, REFERENCE, ROWS, TABLE
from experiments.runs import RESULTS, accuracies, end_on_sigterm, spread
from experiments.task_text import CFIMDB, SST
from minllama.common.errors import InputError
from minllama.common.program import ArgumentParser, run_script
from minllama.evaluation.metrics import check_metrics_file

HEADER = [
    "",
    "value, or best of",
    "SST-5 dev",
    "SST-5 test",
    "CFIMDB dev",
    "trained",
    "time / plain",
    "GiB",
]
SPLITS = ("dev", "test")
PICTURE, CURVE_PICTURE = RESULTS / "methods.svg", RESULTS / "reader.svg"


def cells_of(name: str, time: float | None = None) -> list[str]:
    """A row of the table; what is missing runs.

    Args:
        time: of its training, as a multiple of plain's, where it is known.
    """
    if name in ROWS:
        return trained_cells(name, time)
    return baseline_cells(name) if name in BASELINES else prompted_cells(name)


def trained_cells(name: str, time: float | None) -> list[str]:
    """What is fine-tuned."""
    row, runs = ROWS[name], final_runs(name, SST)
    cfimdb = final_runs(name, CFIMDB) if row.on_cfimdb else []
    trained, memory = measured(name, "trained_parameters"), measured(name, "peak_memory_bytes")
    best = tuned_value(name)
    tried = [best] if row.kept is not None else row.values
    values = ", ".join(f"**{v}**" if v == best and len(tried) > 1 else f"{v}" for v in tried)
    return [
        row.label,
        f"`{row.tuned}` {values}",
        spread(runs, "dev"),
        spread(runs, "test"),
        spread(cfimdb, "dev"),
        f"{trained:,}" if trained else "",
        "" if time is None else f"{time:.1f}",
        f"{memory / 2**30:.1f}" if memory else "",
    ]


def baseline_cells(name: str) -> list[str]:
    """TF-IDF, which chooses its `C` by dev."""
    row = BASELINES[name]
    sst = [run_baseline(name, SST, seed) for seed in (SEEDS if row.shots else [0])]
    cfimdb = [] if row.shots else [run_baseline(name, CFIMDB)]
    return [
        row.label,
        f"`C` {', '.join(map(str, CS))}",
        spread(sst, "dev"),
        spread(sst, "test"),
        spread(cfimdb, "dev"),
        f"{median_low(run['trained_parameters'] for run in sst):,}",
        "",
        "",
    ]


def prompted_cells(name: str) -> list[str]:
    """Prompting, which trains nothing."""
    sst, cfimdb = run_prompted(name, SST), run_prompted(name, CFIMDB)
    parts = (sst["dev"], sst["test"], cfimdb["dev"])
    return [PROMPTED[name].label, "", *(f"{part['accuracy']:.3f}" for part in parts), "0", "", ""]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    help = f"only the table of these rows, without times; of {', '.join(TABLE)}"
    parser.add_argument("--rows", metavar="NAME", nargs="+", choices=TABLE, help=help)
    names = parser.parse_args().rows
    check_metrics_file(RECORDS)
    end_on_sigterm()
    if names is None or set(names).issuperset(CURVE):
        check_matplotlib()
    if names is None:
        names = list(run_rows())
        times = relative_times()
        print_table(cells_of(name, times.get(name)) for name in names)
        draw_methods()
    else:
        print_table(cells_of(name) for name in names)
    if set(names).issuperset(CURVE):
        draw_curve()


def check_matplotlib() -> None:
    """It is not needed by the runs, only at the end.

    Raises:
        InputError: it is not installed.
    """
    try:
        import experiments.picture  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error}; benchmarks/requirements.txt has what is needed") from error


def draw_methods() -> None:
    from experiments import picture

    points = {
        ROWS[name].label: (
            measured(name, "trained_parameters"),
            accuracies(final_runs(name, SST), "dev"),
        )
        for name in REFERENCE | METHODS
    }
    baseline = BASELINES["tf-idf"].label, run_baseline("tf-idf", SST)["dev"]["accuracy"]
    picture.draw_methods(points, baseline, PICTURE)


def draw_curve() -> None:
    from experiments import picture

    points, baseline = {}, run_baseline("tf-idf", SST)
    for name in CURVE:
        runs = final_runs(name, SST)
        points[ROWS[name].reviews_mb] = {split: accuracies(runs, split) for split in SPLITS}
    lines = {split: baseline[split]["accuracy"] for split in SPLITS}
    picture.draw_curve(points, lines, CURVE_PICTURE)


def run_rows() -> Iterator[str]:
    """Run what is missing, before anything is timed, and print each row.

    Returns:
        the names of the rows that there are.
    """
    for name in TABLE:
        try:
            print(*cells_of(name)[:5], sep=" | ", file=sys.stderr, flush=True)
        except NoReviews as error:
            print(f"{name}: left out; {error}", file=sys.stderr, flush=True)
        else:
            yield name


def print_table(rows: Iterable[list[str]]) -> None:
    """In Markdown, as they come."""
    for cells in itertools.chain((HEADER, ["---"] * len(HEADER)), rows):
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
