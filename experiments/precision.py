"""Training losses in float32 and bfloat16: the demo model on the demo reviews.

    .venv/bin/python -m experiments.precision

5 epochs in batches of 8, causal, three seeds. The losses should differ no more than those of two
seeds. `experiments/results/precision.jsonl` keeps the results; without it all runs again.
"""

import functools
from statistics import mean, stdev

from experiments.runs import RESULTS, ROOT, classify, recorded
from minllama.common.program import run_script, script_parser

REVIEWS = str(ROOT / "data/demo/reviews")
RECORDS = RESULTS / "precision.jsonl"
DTYPES = ("float32", "bfloat16")
SEEDS = (1, 2, 3)


def main() -> None:
    script_parser(__doc__).parse_args()
    for dtype in DTYPES:
        records = []
        for seed in SEEDS:
            flags = {"causal": True, "dtype": dtype, "batch_size": 8, "lr": 5e-4, "seed": seed}
            run = functools.partial(classify, REVIEWS, flags)
            records.append(recorded(RECORDS, {"flags": flags}, run))
        losses = zip(*(record["train_loss"] for record in records), strict=True)
        curve = ", ".join(f"{mean(epoch):.3f} ± {stdev(epoch):.3f}" for epoch in losses)
        print(f"{dtype}: train loss on the reviews by epoch: {curve}")


if __name__ == "__main__":
    run_script(main)
