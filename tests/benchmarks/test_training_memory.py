"""The formulas for memory and traffic, against real processes and against real tensors."""

from dataclasses import replace

import pytest
import torch

from benchmarks.training_memory import SHAPES, Training, layer_activations, memory, traffic
from llama import Llama
from minllama.kernels.cpu import accelerate

SMALL, LARGE = (replace(SHAPES[name], on_cpu=True) for name in ("5m", "42m"))
CASES = [
    replace(SMALL, context=256, batch_size=16),
    replace(SMALL, context=1024, batch_size=4),
    replace(LARGE, context=512, batch_size=4),
    replace(LARGE, context=1024, batch_size=2),
]
BFLOAT16, CHECKPOINTING = {"dtype": "bfloat16"}, {"activation_checkpointing": True}
SHARD = {"gpus": 2, "shard": True}
# Peak resident memory in GiB above that before the model was built, in the first process, after
# three steps of pre-training on a CPU (2 cores, Linux). One process and --shard: docs/scaling.md of
# version 0.2. Two replicas: measured in the same way, but for one all-reduce of all gradients.
MEASURED = [
    ({}, (0.67, 0.67, 1.87, 1.87)),
    (BFLOAT16, (0.66, 0.52, 2.11, 1.73)),
    (CHECKPOINTING, (0.20, 0.20, 1.25, 1.25)),
    ({"grad_accum": 2}, (0.69, 0.69, 2.02, 2.02)),
    ({"gpus": 2}, (0.37, 0.37, 1.17, 1.17)),
    ({"gpus": 2} | BFLOAT16, (0.37, 0.30, 1.34, 1.15)),
    ({"gpus": 2} | CHECKPOINTING, (0.14, 0.14, 0.86, 0.86)),
    ({"gpus": 2, "grad_accum": 2}, (0.39, 0.39, 1.33, 1.33)),
    (SHARD, (0.34, 0.34, 1.01, 1.01)),
    (SHARD | BFLOAT16, (0.30, 0.23, 1.02, 0.83)),
    (SHARD | CHECKPOINTING, (0.12, 0.12, 0.70, 0.70)),
    (SHARD | {"grad_accum": 2}, (0.35, 0.35, 1.09, 1.09)),
]


@pytest.mark.parametrize(("flags", "peaks"), MEASURED, ids=str)
def test_peaks_are_within_15_percent_of_real_processes(flags, peaks):
    computed = [memory(replace(case, **flags))["peak"] / 2**30 for case in CASES]
    assert computed == pytest.approx(peaks, rel=0.15)


@pytest.mark.parametrize(
    ("shape", "published"),
    [("42m", 41_689_600), ("1.1b", 1_100_048_384), ("7b", 6_738_415_616)],
)
def test_shapes_have_as_many_weights_as_published(shape, published):
    assert SHAPES[shape].weights == published


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_layers_keep_what_autograd_saves(n_kv_heads):
    t = Training(50, 32, 1, 4, n_kv_heads, 48, context=16)
    config = t.config
    config.causal = True
    llama = Llama(config)
    accelerate(llama)
    saved: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in llama.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        is_rotation = tensor.is_complex()  # one table for all layers and sequences
        storage = tensor.untyped_storage()
        saved.setdefault(storage.data_ptr(), 0 if is_rotation else storage.nbytes())
        kept.append(tensor)
        return tensor

    kept: list[torch.Tensor] = []  # so that no storage's address is used twice
    x = torch.randn(3, t.context, t.dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        llama.layers[0](x)
    assert sum(saved.values()) == pytest.approx(3 * t.context * layer_activations(t), rel=0.15)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_what_each_gpu_sends_around_a_ring(dtype, width):
    """Of n pieces each GPU passes on n - 1; an all-reduce is a reduce-scatter and an all-gather."""
    t = Training(300, 32, 2, 4, 4, 48, 16, gpus=4, batch_size=4, grad_accum=3, dtype=dtype)
    piece, layers_piece = t.weights / 4, (t.weights - 2 * 300 * 32 - 32) / 4
    assert traffic(t) == 2 * 3 * 4 * piece
    gathered = 3 * width * (piece + layers_piece)  # layers are gathered once more going backward
    assert traffic(replace(t, shard=True)) == 3 * (gathered + 3 * 4 * piece)
