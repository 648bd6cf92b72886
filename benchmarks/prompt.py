"""Zero-shot prompting in the reference's way, in the default mode, and causally, in turns.

    .venv/bin/python -m benchmarks.make_checkpoint random42M.pt
    .venv/bin/python -m benchmarks.prompt --pretrained-model-path random42M.pt --data data/sst
    .venv/bin/python -m benchmarks.prompt --pretrained-model-path random42M.pt --data data/cfimdb \\
        --n_dev 40

The table has sentences per second, and in brackets the ratio to the first way.
"""

from benchmarks.compare import WAYS, evaluation_rate, make_ways_parser, race
from minllama.common.program import positive, run_script


def measure(records: list[dict]) -> dict[str, float]:
    return {"sentences/s": evaluation_rate(records)}


def main() -> None:
    parser = make_ways_parser(__doc__, batch_size=10)
    parser.add_argument("--n_dev", type=positive, default=320, help="sentences of dev, and of test")
    flags = parser.parse_args()
    n_lines = {"train": 2, "dev": flags.n_dev, "test": flags.n_dev}
    race(flags, WAYS, n_lines, measure, option="prompt")


if __name__ == "__main__":
    run_script(main)
