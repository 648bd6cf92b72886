"""Fine-tuning in the reference's way, in the default mode, and causally, in turns.

    .venv/bin/python -m benchmarks.make_checkpoint random42M.pt
    .venv/bin/python -m benchmarks.finetune --pretrained-model-path random42M.pt --data data/sst
    .venv/bin/python -m benchmarks.finetune --pretrained-model-path random42M.pt \\
        --data data/cfimdb --batch_size 10 --n_train 200
    .venv/bin/python -m benchmarks.finetune --pretrained-model-path random42M.pt \\
        --ways "causal bfloat16" --repository ../before

Every run trains on a sample of train and evaluates samples of dev and test. The table has sentences
per second, and how many epochs an hour would have at these rates: an epoch trains on train, and
evaluates train and dev. In brackets is the ratio to the first way.
"""

from benchmarks.ways import WAYS, evaluation_rate, make_ways_parser, race
from minllama.common.program import run_script
from minllama.text.labelled import read_labelled


def main() -> None:
    parser = make_ways_parser(__doc__, batch_size=80)
    parser.add_argument("--n_train", type=int, default=1600, help="sentences to train on")
    flags = parser.parse_args()
    n_train, n_dev = (len(read_labelled(f"{flags.data}-{split}.txt")) for split in ("train", "dev"))

    def measure(records: list[dict]) -> dict[str, float]:
        train, evaluate = records[0]["train_sentences_per_second"], evaluation_rate(records)
        seconds = n_train / train + (n_train + n_dev) / evaluate
        return {"train": train, "evaluate": evaluate, "epochs/h": 3600 / seconds}

    ways = {way: WAYS[way] for way in flags.ways}
    n_lines = {"train": flags.n_train, "dev": flags.n_train // 4, "test": flags.n_train // 4}
    race(flags, "finetune", ways, n_lines, measure)


if __name__ == "__main__":
    run_script(main)
