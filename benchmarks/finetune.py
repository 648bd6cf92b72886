"""Speed and memory of fine-tuning: the reference's way, the default, and causal, in turns.

    .venv/bin/python -m benchmarks.make_checkpoint random42M.pt
    .venv/bin/python -m benchmarks.finetune --pretrained-model-path random42M.pt --data data/sst
    .venv/bin/python -m benchmarks.finetune --pretrained-model-path random42M.pt \\
        --data data/cfimdb --batch_size 10 --n_train 200
    .venv/bin/python -m benchmarks.finetune --pretrained-model-path random42M.pt \\
        --less_memory --rounds 1 --n_train 640

Every run trains on a sample of train, which has its longest sentence, and evaluates samples of dev
and test. The table has sentences per second; how many epochs an hour would have at these rates,
where an epoch trains on train and evaluates train and dev; and peak memory. In brackets is the
ratio to the first way. `--less_memory` adds ways that save memory.
"""

from benchmarks.compare import WAYS, evaluation_rate, make_ways_parser, race
from minllama.common.errors import InputError
from minllama.common.program import positive, run_script
from minllama.text.labelled import read_labelled


def main() -> None:
    parser = make_ways_parser(__doc__, batch_size=80)
    parser.add_argument("--n_train", type=positive, default=1600, help="sentences to train on")
    parser.add_argument(
        "--min_words", type=positive, default=1, help="repeat sentences up to so many"
    )
    parser.add_argument("--less_memory", action="store_true", help="compare more ways")
    flags = parser.parse_args()
    n_train, n_dev = (len(read_labelled(f"{flags.data}-{split}.txt")) for split in ("train", "dev"))
    ways = dict(WAYS)
    if flags.less_memory and flags.batch_size < 5:
        raise InputError(f"--batch_size {flags.batch_size}: --less_memory needs 5 or more")
    if flags.less_memory:
        accumulate = {"grad_accum": 5, "batch_size": flags.batch_size // 5}
        checkpoint = {"activation_checkpointing": True}
        ways["  --grad_accum 5"] = WAYS["causal bfloat16"] | accumulate
        ways["  --activation_checkpointing"] = WAYS["causal bfloat16"] | checkpoint
        ways["  both"] = WAYS["causal bfloat16"] | accumulate | checkpoint
    ways = {name: {"epochs": 1, "skip_train_eval": True} | way for name, way in ways.items()}

    def measure(records: list[dict]) -> dict[str, float]:
        train, evaluate = records[0]["train_sentences_per_second"], evaluation_rate(records)
        seconds = n_train / train + (n_train + n_dev) / evaluate
        memory = max(record["peak_memory_bytes"] for record in records) / 2**30
        return {"train": train, "evaluate": evaluate, "epochs/h": 3600 / seconds, "GiB": memory}

    n_lines = {"train": flags.n_train, "dev": flags.n_train // 4, "test": flags.n_train // 4}
    race(flags, ways, n_lines, measure, flags.min_words, option="finetune")


if __name__ == "__main__":
    run_script(main)
