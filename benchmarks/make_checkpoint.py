"""Write a checkpoint of a given shape with random weights; by default that of stories42M.pt.

    .venv/bin/python -m benchmarks.make_checkpoint random42M.pt

Good for measuring size and speed, and for nothing else.
"""

from argparse import RawDescriptionHelpFormatter

import torch

from config import LlamaConfig
from llama import Llama
from minllama.checkpoints.pt import write_checkpoint
from minllama.common.program import ArgumentParser, run_script

SHAPE = {
    "dim": 512,
    "n_layers": 8,
    "n_heads": 8,
    "n_kv_heads": 8,
    "vocab_size": 32000,
    "multiple_of": 32,
    "max_seq_len": 1024,
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("path")
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    shape = vars(parser.parse_args())
    path = shape.pop("path")
    torch.manual_seed(0)
    # Two copies of the tied matrix, as in stories42M.pt.
    weights = {
        name: tensor.clone() for name, tensor in Llama(LlamaConfig(**shape)).state_dict().items()
    }
    write_checkpoint({"model": weights, "model_args": shape}, path)


if __name__ == "__main__":
    run_script(main)
