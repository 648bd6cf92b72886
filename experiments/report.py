"""Compare the methods: the demo model on SST-5 and CFIMDB, in one table and two pictures.

    .venv/bin/python -m pip install -r benchmarks/requirements.txt
    .venv/bin/python -m experiments.report
    .venv/bin/python -m experiments.report --rows plain "reader plain" "reader mean"

Each row has one hyperparameter, which has a fixed value or is tuned on SST-5's dev with one seed.
Then the row runs with three other seeds, some rows on CFIMDB too. For the time the rows take turns
on a sample of SST-5, in three rounds; that needs an idle machine. Every run is a process. What
`experiments/results/methods.jsonl` has does not run again, so that a report can be interrupted.
`--rows` makes the table of some rows alone, without times and without the picture of the methods.

The rows whose names begin with "reader" need a text of reviews (see docs/pretraining.md). Without
it, those that are not recorded are left out. The second picture is drawn where the rows of all
domain-adapted models, prompt-based, are in the table.
"""

import sys
from collections.abc import Iterable, Iterator
from statistics import median_low

from experiments.baseline import CS
from experiments.measure import (
    RECORDS,
    SEEDS,
    MissingReviews,
    final_runs,
    measured,
    relative_times,
    run_baseline,
    run_prompted,
    tuned_value,
)
from experiments.rows import BASELINES, CURVE, METHODS, PROMPTED, REFERENCE, ROWS, TABLE
from experiments.runs import RESULTS, accuracies, describe
from experiments.task_text import CFIMDB, SST
from minllama.common.errors import InputError
from minllama.common.program import run_script, script_parser
from minllama.evaluation.metrics import check_metrics_file

HEADER = ["", "value, or best of", "SST-5 dev", "SST-5 test", "CFIMDB dev"]
HEADER += ["trained", "time / plain", "GiB"]
SPLITS = ("dev", "test")
PICTURE, CURVE_PICTURE = RESULTS / "methods.svg", RESULTS / "reader.svg"


def cells_of(name: str, time: float | None = None) -> list[str]:
    """A row of the table; missing runs are made. `time` is relative to plain's, if known."""
    if name in ROWS:
        return trained_cells(name, time)
    return baseline_cells(name) if name in BASELINES else prompted_cells(name)


def trained_cells(name: str, time: float | None) -> list[str]:
    row, runs = ROWS[name], final_runs(name, SST)
    cfimdb = final_runs(name, CFIMDB) if row.on_cfimdb else []
    trained, memory = measured(name, "trained_parameters"), measured(name, "peak_memory_bytes")
    best = tuned_value(name)
    values = [f"**{v}**" if v == best and len(row.values) > 1 else f"{v}" for v in row.values]
    return [
        row.label,
        f"`{row.tuned}` {', '.join(values)}",
        describe(runs, "dev"),
        describe(runs, "test"),
        describe(cfimdb, "dev"),
        f"{trained:,}" if trained else "",
        "" if time is None else f"{time:.1f}",
        f"{memory / 2**30:.1f}" if memory else "",
    ]


def baseline_cells(name: str) -> list[str]:
    row = BASELINES[name]
    sst = [run_baseline(name, SST, seed) for seed in (SEEDS if row.shots else [0])]
    cfimdb = [] if row.shots else [run_baseline(name, CFIMDB)]
    return [
        row.label,
        f"`C` {', '.join(map(str, CS))}",
        describe(sst, "dev"),
        describe(sst, "test"),
        describe(cfimdb, "dev"),
        f"{median_low(run['trained_parameters'] for run in sst):,}",
        "",
        "",
    ]


def prompted_cells(name: str) -> list[str]:
    sst, cfimdb = run_prompted(name, SST), run_prompted(name, CFIMDB)
    results = [f"{run['accuracy']:.3f}" for run in (sst["dev"], sst["test"], cfimdb["dev"])]
    return [PROMPTED[name].label, "", *results, "0", "", ""]


def run_rows() -> Iterator[str]:
    """Make the missing runs before anything is timed; yield the names of rows that could run."""
    for name in TABLE:
        try:
            print(*cells_of(name)[:5], sep=" | ", file=sys.stderr, flush=True)
        except MissingReviews as error:
            print(f"{name}: left out; {error}", file=sys.stderr, flush=True)
        else:
            yield name


def print_table(rows: Iterable[list[str]]) -> None:
    """Print Markdown, row by row."""
    print(f"| {' | '.join(HEADER)} |")
    print(f"| {' | '.join(['---'] * len(HEADER))} |")
    for cells in rows:
        print(f"| {' | '.join(cells)} |", flush=True)


def check_matplotlib() -> None:
    """Check before the runs that pictures can be drawn, or raise an InputError."""
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


def main() -> None:
    parser = script_parser(__doc__)
    help = f"only the table of these rows, without times; of {', '.join(TABLE)}"
    parser.add_argument("--rows", metavar="NAME", nargs="+", choices=TABLE, help=help)
    names = parser.parse_args().rows
    check_metrics_file(RECORDS)
    if names is None or set(names).issuperset(CURVE):
        check_matplotlib()
    if names is None:
        names = list(run_rows())
        times = relative_times()
        print_table(cells_of(name, times.get(name)) for name in names)
        draw_methods()
    else:
        print_table(map(cells_of, names))
    if set(names).issuperset(CURVE):
        draw_curve()


if __name__ == "__main__":
    run_script(main)
