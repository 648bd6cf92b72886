"""Peak memory of fine-tuning in the reference's way, in the default mode, and in less memory.

    .venv/bin/python -m benchmarks.make_checkpoint random42M.pt
    .venv/bin/python -m benchmarks.memory --pretrained-model-path random42M.pt --data data/sst
    .venv/bin/python -m benchmarks.memory --pretrained-model-path random42M.pt \\
        --data data/cfimdb --batch_size 10 --batches 3 [--min_words 1024]

Every run trains on some batches, and evaluates as many, among them the longest sentence of the
data. With --min_words every sentence is repeated to that length, and cut to the context.
"""

from benchmarks.ways import FASTEST, WAYS, make_ways_parser, race
from minllama.common.program import run_script


def peak_memory(records: list[dict]) -> dict[str, float]:
    return {"GiB": max(record["peak_memory_bytes"] for record in records) / 2**30}


def main() -> None:
    parser = make_ways_parser(__doc__, batch_size=80)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--min_words", type=int, default=0)
    parser.set_defaults(rounds=1)
    flags = parser.parse_args()
    accumulate = {"grad_accum": 5, "batch_size": flags.batch_size // 5}
    checkpoint = {"activation_checkpointing": True}
    ways = {way: WAYS[way] for way in flags.ways} | {
        "  --grad_accum 5": FASTEST | accumulate,
        "  --activation_checkpointing": FASTEST | checkpoint,
        "  both": FASTEST | accumulate | checkpoint,
    }
    n_lines = dict.fromkeys(("train", "dev", "test"), flags.batches * flags.batch_size)
    race(flags, "finetune", ways, n_lines, peak_memory)


if __name__ == "__main__":
    run_script(main)
