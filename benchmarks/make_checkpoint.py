"""Write a checkpoint with random weights; by default of the shape of stories42M.pt.

    .venv/bin/python -m benchmarks.make_checkpoint random42M.pt

Use it to measure speed and memory only.
"""

import torch

from benchmarks.training_memory import SHAPES
from minllama.checkpoints import pt
from minllama.checkpoints.layout import EMBEDDING, HEAD, Checkpoint, shapes_of
from minllama.common.files import check_outputs
from minllama.common.program import run_script, script_parser


def random_checkpoint(shape: str, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """A checkpoint of one of `SHAPES`."""
    config = SHAPES[shape].config
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, size in shapes_of(config).items():
        tensors[name] = torch.ones(size, dtype=dtype)
        if len(size) == 2:
            tensors[name].normal_(std=0.02, generator=generator)
    if config.tie_embeddings:  # two copies, as in stories42M.pt
        tensors[EMBEDDING] = tensors[HEAD].clone()
    return Checkpoint(config, tensors, shape)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("path")
    parser.add_argument("--shape", choices=SHAPES, default="42m")
    flags = parser.parse_args()
    check_outputs([flags.path], [])
    pt.save(random_checkpoint(flags.shape), flags.path)


if __name__ == "__main__":
    run_script(main)
