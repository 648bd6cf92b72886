"""Batch-1 decoding on a CPU as one compiled function (Numba).

A step is a few hundred small operations. One by one, Python and PyTorch take longer for them than
the processor. Here they are plain loops that read like the equations. They are compiled once, in
some seconds, and then loaded from a cache on the disk.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from numba import prange
from numba.extending import overload

from base_llama import replace
from llama import Llama
from minllama.inference.cache import KVCache
from minllama.kernels.batch1 import Batch1Llama
from minllama.kernels.quantize import (
    DecodingEmbedding,
    FloatLinear,
    Int8Linear,
    fused_weights,
    layers_of,
    quantize,
    replace_ends,
    replace_layer,
)

FAST = {"reassoc", "contract", "nsz"}  # sums in any order, so that they are vectorized; NaN stays
Array = np.ndarray


def as_float(weight: Any) -> np.float32:
    """A weight as float32. Numba has no bfloat16, so its bits come as uint16."""
    return np.float32(weight)


@overload(as_float, inline="always")
def _as_float(weight):  # type: ignore[no-untyped-def]  # Numba wants it without annotations
    if weight == numba.types.uint16:
        return lambda weight: np.uint32(np.uint32(weight) << np.uint32(16)).view(np.float32)
    return lambda weight: np.float32(weight)


@numba.njit(fastmath=FAST, inline="always")
def norm(x: Array, weight: Array, eps: np.float32, out: Array) -> None:
    """RMSNorm: x / √(mean(x²) + eps) · weight."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    factor = np.float32(1) / np.sqrt(total / np.float32(len(x)) + eps)
    for i in range(len(x)):
        out[i] = x[i] * factor * weight[i]


@numba.njit(fastmath=FAST, inline="always")
def dot(row: Array, x: Array) -> np.float32:
    """Σ row · x, in float32."""
    total = np.float32(0)
    for i in range(len(x)):
        total += as_float(row[i]) * x[i]
    return total


@numba.njit(fastmath=FAST, inline="always")
def matvec(weight: Array, scale: Array, x: Array, out: Array) -> None:
    """scale · (weight x)."""
    for i in prange(len(out)):
        out[i] = dot(weight[i], x) * scale[i]


@numba.njit(fastmath=FAST, inline="always")
def add_matvec(weight: Array, scale: Array, x: Array, out: Array) -> None:
    """out + scale · (weight x)."""
    for i in prange(len(out)):
        out[i] += dot(weight[i], x) * scale[i]


@numba.njit(fastmath=FAST, inline="always")
def swiglu(w1_w3: Array, scale: Array, x: Array, out: Array) -> None:
    """silu(w1 x) · w3 x."""
    n = len(out)
    for i in prange(n):
        gate = dot(w1_w3[i], x) * scale[i]
        up = dot(w1_w3[n + i], x) * scale[n + i]
        out[i] = gate / (np.float32(1) + np.exp(-gate)) * up


@numba.njit(fastmath=FAST, inline="always")
def rotate(heads: Array, rotation: Array) -> None:
    """Rotate each pair of neighbours in heads `(n, head_dim)`, in place.

    Args:
        rotation: cosine and sine for each pair, `(head_dim / 2, 2)`.
    """
    for h in range(heads.shape[0]):
        for i in range(heads.shape[1] // 2):
            cos, sin = rotation[i, 0], rotation[i, 1]
            a, b = heads[h, 2 * i], heads[h, 2 * i + 1]
            heads[h, 2 * i] = a * cos - b * sin
            heads[h, 2 * i + 1] = a * sin + b * cos


@numba.njit(fastmath=FAST)
def attend(query: Array, keys: Array, values: Array, scores: Array, out: Array) -> None:
    """softmax(query · keyᵀ / √head_dim) · value of one head.

    Args:
        query: `(head_dim,)`.
        keys, values: `(max_len, head_dim)`.
        scores: `(n_seen,)`, overwritten.
        out: `(head_dim,)`, written.
    """
    factor = np.float32(1 / math.sqrt(len(query)))
    for t in range(len(scores)):
        scores[t] = dot(query, keys[t]) * factor
    highest = scores.max()
    total = np.float32(0)
    for t in range(len(scores)):
        scores[t] = np.exp(scores[t] - highest)
        total += scores[t]
    out[:] = 0
    for t in range(len(scores)):
        weight = scores[t] / total
        for i in range(len(out)):
            out[i] += weight * values[t, i]


@numba.njit(fastmath=FAST, inline="always")
def attention(heads: Array, cache: Array, scores: Array, out: Array) -> None:
    """Attention of the newest token to all so far.

    Args:
        heads: query, key and value of the token, `(n_heads + 2 · n_kv_heads, head_dim)`.
        cache: keys and values `(2, n_kv_heads, max_len, head_dim)`; the token's are written.
        scores: `(n_heads, n_seen)`, overwritten.
        out: `(n_heads, head_dim)`, written.
    """
    n_heads, n_seen = scores.shape
    n_kv_heads = cache.shape[1]
    for h in range(n_kv_heads):
        for i in range(heads.shape[1]):
            cache[0, h, n_seen - 1, i] = heads[n_heads + h, i]
            cache[1, h, n_seen - 1, i] = heads[n_heads + n_kv_heads + h, i]
    for h in prange(n_heads):
        kv = h * n_kv_heads // n_heads
        attend(heads[h], cache[0, kv], cache[1, kv], scores[h], out[h])


def step(
    token: int,
    position: int,
    weights: tuple[Array, ...],
    scales: tuple[Array, ...],
    norms: Array,
    rotations: Array,
    cache: Array,
    eps: np.float32,
    logits: Array,
) -> None:
    """Compute the logits `(vocab_size,)` of the token after this one.

    Args:
        weights, scales, norms, rotations: see `CompiledLlama`.
        cache: keys and values `(n_layers, 2, n_kv_heads, max_len, head_dim)`; its own are written.
    """
    embedding, w_qkv, w_output, w1_w3, w2, head = weights
    s_qkv, s_output, s1_s3, s2, s_head = scales
    n_layers, _, n_kv_heads, _, head_dim = cache.shape
    _, dim, hidden_dim = w2.shape
    x, normed = np.empty(dim, np.float32), np.empty(dim, np.float32)
    heads = np.empty((w_qkv.shape[1] // head_dim, head_dim), np.float32)
    scores = np.empty((dim // head_dim, position + 1), np.float32)
    attended = np.empty((dim // head_dim, head_dim), np.float32)
    gated = np.empty(hidden_dim, np.float32)
    for i in range(dim):
        x[i] = as_float(embedding[token, i])
    for layer in range(n_layers):
        norm(x, norms[2 * layer], eps, normed)
        matvec(w_qkv[layer], s_qkv[layer], normed, heads.reshape(-1))
        rotate(heads[:-n_kv_heads], rotations[position])
        attention(heads, cache[layer], scores, attended)
        add_matvec(w_output[layer], s_output[layer], attended.reshape(-1), x)
        norm(x, norms[2 * layer + 1], eps, normed)
        swiglu(w1_w3[layer], s1_s3[layer], normed, gated)
        add_matvec(w2[layer], s2[layer], gated, x)
    norm(x, norms[2 * n_layers], eps, normed)
    matvec(head[0], s_head[0], normed, logits)


class CompiledLlama(Batch1Llama):
    """A causal model on a CPU whose step for a single row is compiled.

    Prompts and batches go through PyTorch, with the same weights. Numba starts as many threads as
    `NUMBA_NUM_THREADS` was when it was imported; next to another busy process idle threads slow the
    others down.

    Args:
        llama: the model, which is converted in place.
        dtype: precision of the weights, as `prepare_for_decoding` takes it.

    Attributes:
        constants: the embedding and the stacks of `stack_weights`; their scales; the weights of the
            norms, two of each layer and the last, `(2 · n_layers + 1, dim)`; cosine and sine of the
            rotations, `(max_seq_len, head_dim / 2, 2)`.
    """

    def __init__(self, llama: Llama, dtype: str):
        stacks, scales = stack_weights(llama, dtype)
        embedding = llama.tok_embeddings.weight
        if llama.config.tie_embeddings and dtype != "int8":  # the head's copy is enough
            embedding = stacks[-1][0]
            replace(llama, "tok_embeddings", DecodingEmbedding.from_pretrained(embedding))
        elif embedding.dtype == torch.float16:  # which Numba does not have on a CPU
            embedding = embedding.float()
        super().__init__(llama)
        norms = [
            norm.weight
            for layer in layers_of(llama)
            for norm in (layer.attention_norm, layer.ffn_norm)
        ]
        self.constants = (
            tuple(as_array(tensor) for tensor in (embedding, *stacks)),
            tuple(as_array(tensor) for tensor in scales),
            as_array(torch.stack([*norms, llama.norm.weight])),
            as_array(torch.view_as_real(self.rotations)),
        )
        self.eps = np.float32(self.config.layer_norm_eps)
        self.logits = torch.empty(1, llama.vocab_size)
        self.row = self.logits[0].numpy()  # the same memory
        self.n_threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        self._compile()

    def step(self, token: int, position: int, keys_values: torch.Tensor) -> torch.Tensor:
        """Compute logits as `Batch1Llama.step` does. The next step overwrites them."""
        numba.set_num_threads(self.n_threads)
        cache = keys_values.numpy()
        self.compiled(token, position, *self.constants, cache, self.eps, self.row)
        return self.logits

    def _compile(self) -> None:
        """Compile the step, or load it from its cache on the disk."""
        keys_values = KVCache(self, 1, 1).data[:, :, 0]
        try:
            self.compiled = numba.njit(step, parallel=True, fastmath=FAST, cache=True)
            self.step(0, 0, keys_values)
        except Exception:  # a cache without a place, full or damaged costs only compile time
            self.compiled = numba.njit(step, parallel=True, fastmath=FAST)
            self.step(0, 0, keys_values)


def stack_weights(llama: Llama, dtype: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Move the weights of all layers into one tensor for each kind, and make the layers use it.

    Returns:
        the stacks `(n_layers, out, in)` of query, key and value; output; w1 and w3; w2; and the
        head's `(1, out, in)`; and the scales of their rows, `(…, out)`, 1 except in int8.
    """
    layers = layers_of(llama)
    shapes = [(len(layers), *weight.shape) for weight in fused_weights(layers[0])]
    shapes.append((1, *llama.output.weight.shape))
    stacks = [empty_in_huge_pages(shape, getattr(torch, dtype)) for shape in shapes]
    scales = [torch.ones(shape[:-1]) for shape in shapes]

    def store(kind: int, index: int, weight: torch.Tensor) -> FloatLinear | Int8Linear:
        stack, scale = stacks[kind][index], scales[kind][index]
        if dtype != "int8":
            return FloatLinear(stack.copy_(weight), reorder=False)
        numbers, factors = quantize(weight)
        return Int8Linear(stack.copy_(numbers), scale.copy_(factors))

    with torch.no_grad():
        for i, layer in enumerate(layers):
            weights = enumerate(fused_weights(layer))
            replace_layer(layer, [store(kind, i, weight) for kind, weight in weights])
        replace_ends(llama, store(len(shapes) - 1, 0, llama.output.weight))
    return stacks, scales


def empty_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in NumPy's memory, for which NumPy asks Linux for pages of 2 MiB.

    A step reads all weights. With large pages it looks up fewer addresses.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(n_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64  # at the start of a cache line
    return torch.from_numpy(memory[start : start + n_bytes]).view(dtype).view(shape)


def as_array(tensor: torch.Tensor) -> Array:
    """A tensor's memory for Numba; of bfloat16 the bits."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
