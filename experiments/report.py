"""What the methods are worth: the demo model on SST-5 and CFIMDB, in one table and one picture.

    .venv/bin/python -m pip install -r benchmarks/requirements.txt
    .venv/bin/python -m experiments.report

A row's one hyperparameter is tuned on SST-5's dev with one seed, if it has several values. Then
three other seeds run. The reference rows and those that are best on SST-5's dev run on CFIMDB too,
with the same value. For the time, all rows but those of few sentences take turns in training on a
part of SST-5, twice; that needs an idle machine. Every run is a process. All can be killed: what
`experiments/results/methods.jsonl` has does not run again, only checkpoints that it needs are made
again. `--only PART` runs the rows with that in their name, on SST-5, and prints no table.
"""

from argparse import RawDescriptionHelpFormatter
from statistics import median, median_low

from common.errors import InputError
from common.program import ArgumentParser, run_script
from experiments.baseline import CS
from experiments.measure import (
    RECORDS,
    SEEDS,
    best_methods,
    final_runs,
    measured,
    relative_times,
    run_baseline,
    run_prompt,
    tuned_value,
)
from experiments.rows import BASELINE, FEW_SHOT, METHODS, PROMPTS, REFERENCE, ROWS, SHOTS
from experiments.runs import RESULTS, accuracies, end_on_sigterm, spread
from experiments.task_text import CFIMDB, SST
from tasks.evaluation import check_metrics_file

HEADER = ["", "best of", "SST-5 dev", "SST-5 test", "CFIMDB dev", "trained", "time / plain", "GiB"]
PICTURE = RESULTS / "methods.svg"


def run_rows(names: list[str]) -> None:
    """Run what is missing on SST-5, and print a line for each row."""
    for name in names:
        value, found = tuned_value(name)
        print(f"{name}: {spread(final_runs(name, SST), 'dev')} with {value} of {found}", flush=True)


def make_table() -> list[list[str]]:
    """The cells, row by row; what is missing runs."""
    on_cfimdb = [*REFERENCE, *best_methods()]
    times = relative_times()

    def cells(name: str) -> list[str]:
        return trained_cells(name, times.get(name), name in on_cfimdb)

    return [
        *(cells(name) for name in REFERENCE),
        baseline_cells(BASELINE, [run_baseline(SST)], [run_baseline(CFIMDB)]),
        *(cells(name) for name in METHODS),
        *(cells(name) for name in FEW_SHOT),
        baseline_cells(
            f"64 sentences a label: {BASELINE}",
            [run_baseline(SST, SHOTS["shots"], seed) for seed in SEEDS],
        ),
        *(prompted_cells(label) for label in PROMPTS),
    ]


def trained_cells(name: str, time: float | None, on_cfimdb: bool) -> list[str]:
    """A row of the table: what is fine-tuned.

    Args:
        time: of its training, as a multiple of plain's, where it is known.
        on_cfimdb: whether it runs there too.
    """
    row, runs = ROWS[name], final_runs(name, SST)
    trained, memory = measured(name, "trained_parameters"), measured(name, "peak_memory_bytes")
    best, found = tuned_value(name)
    values = ", ".join(f"**{v}**" if v == best and len(found) > 1 else f"{v}" for v in found)
    return [
        row.label,
        f"`{row.tuned}` {values}",
        spread(runs, "dev"),
        spread(runs, "test"),
        spread(final_runs(name, CFIMDB), "dev") if on_cfimdb else "",
        f"{trained:,}" if trained else "",
        "" if time is None else f"{time:.1f}",
        f"{memory / 2**30:.1f}" if memory else "",
    ]


def baseline_cells(label: str, sst: list[dict], cfimdb: list[dict] | None = None) -> list[str]:
    """A row of the table: what a sceptic would use."""
    return [
        label,
        f"`C` {', '.join(map(str, CS))}",
        spread(sst, "dev"),
        spread(sst, "test"),
        spread(cfimdb, "dev") if cfimdb else "",
        f"{median_low(run['trained_parameters'] for run in sst):,}",
        f"{median(run['seconds'] for run in sst):.0f} s",
        "",
    ]


def prompted_cells(label: str) -> list[str]:
    """A row of the table: prompting, which trains nothing."""
    sst, cfimdb = run_prompt(label, SST), run_prompt(label, CFIMDB)
    parts = (sst["dev"], sst["test"], cfimdb["dev"])
    return [label, "", *(f"{part['accuracy']:.3f}" for part in parts), "0", "", ""]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    help = "tune and run only rows with this in their name, on SST-5; print no table"
    parser.add_argument("--only", metavar="PART", default="", help=help)
    only = parser.parse_args().only
    names = [name for name in ROWS if only in name]
    if not names:
        parser.error(f"--only {only}: expected a part of one of {', '.join(ROWS)}")
    check_metrics_file(RECORDS)
    end_on_sigterm()
    if only:
        run_rows(names)
        return
    try:
        from experiments.picture import draw  # needs matplotlib; the runs do not
    except ImportError as error:
        raise InputError(f"{error}; benchmarks/requirements.txt has what is needed") from error
    run_rows(names)
    for cells in (HEADER, ["---"] * len(HEADER), *make_table()):
        print(f"| {' | '.join(cells)} |")
    points = {
        ROWS[name].label: (
            measured(name, "trained_parameters"),
            accuracies(final_runs(name, SST), "dev"),
        )
        for name in REFERENCE | METHODS
    }
    draw(points, (BASELINE, run_baseline(SST)["dev"]["accuracy"]), PICTURE)


if __name__ == "__main__":
    run_script(main)
