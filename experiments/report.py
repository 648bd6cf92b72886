"""Compare the methods: the demo model on SST-5 and CFIMDB, in one table and two pictures.

    .venv/bin/python -m pip install -r benchmarks/requirements.txt
    .venv/bin/python -m experiments.report

Each row has one hyperparameter, which has a fixed value or is tuned on SST-5's dev with one seed.
Then the row runs with three other seeds, some rows on CFIMDB too. For the time the rows take turns
on a sample of SST-5, in three rounds; that needs an idle machine. Every run is a process. What
`experiments/results/methods.jsonl` has does not run again, so that a report can be interrupted.
Runs of the rows whose names begin with "reader" need a text of reviews (see docs/pretraining.md).
"""

import sys

from experiments.measure import RECORDS, final_runs, measured, relative_times, tuned_value
from experiments.rows import CURVE, METHODS, REFERENCE, ROWS
from experiments.runs import RESULTS, accuracies, describe
from experiments.task_text import CFIMDB, SST
from minllama.common.program import run_script, script_parser
from minllama.evaluation.metrics import check_metrics_file
from minllama.evaluation.plot import check_picture

HEADER = ["", "value, or best of", "SST-5 dev", "SST-5 test", "CFIMDB dev"]
HEADER += ["trained", "time / plain", "GiB"]
SPLITS = ("dev", "test")
PICTURE, CURVE_PICTURE = RESULTS / "methods.svg", RESULTS / "reader.svg"


def cells_of(name: str, time: float | None = None) -> list[str]:
    """A row of the table; missing runs are made. `time` is relative to plain's, if known."""
    row, runs = ROWS[name], final_runs(name, SST)
    cfimdb = final_runs(name, CFIMDB) if row.on_cfimdb else []
    best = tuned_value(name) if len(row.values) > 1 else None
    values = [f"**{value}**" if value == best else str(value) for value in row.values]
    trained, memory = measured(name, "trained_parameters"), measured(name, "peak_memory_bytes")
    if row.option == "prompt":
        trained, memory = 0, None
    return [
        row.label,
        f"`{row.tuned}` {', '.join(values)}" if row.tuned else "",
        describe(runs, "dev"),
        describe(runs, "test"),
        describe(cfimdb, "dev"),
        "" if trained is None else f"{trained:,}",
        "" if time is None else f"{time:.1f}",
        "" if memory is None else f"{memory / 2**30:.1f}",
    ]


def draw_pictures() -> None:
    """Draw accuracy by trained parameters, and by the amount of reviews in pre-training."""
    from experiments import picture

    points = {
        ROWS[name].label: (
            measured(name, "trained_parameters") or 0,
            accuracies(final_runs(name, SST), "dev"),
        )
        for name in REFERENCE | METHODS
    }
    (baseline,) = final_runs("tf-idf", SST)
    lines = {split: baseline[split]["accuracy"] for split in SPLITS}
    picture.draw_methods(points, (ROWS["tf-idf"].label, lines["dev"]), PICTURE)
    curve = {}
    for name in CURVE:
        runs = final_runs(name, SST)
        curve[ROWS[name].reviews_mb] = {split: accuracies(runs, split) for split in SPLITS}
    picture.draw_curve(curve, lines, CURVE_PICTURE)


def main() -> None:
    script_parser(__doc__).parse_args()
    check_metrics_file(RECORDS)
    check_picture(PICTURE)
    for name in ROWS:  # all runs, before anything is timed
        print(*cells_of(name)[:5], sep=" | ", file=sys.stderr, flush=True)
    times = relative_times()
    for cells in (HEADER, ["---"] * len(HEADER)):
        print(f"| {' | '.join(cells)} |")
    for name in ROWS:
        print(f"| {' | '.join(cells_of(name, times.get(name)))} |")
    draw_pictures()


if __name__ == "__main__":
    run_script(main)
