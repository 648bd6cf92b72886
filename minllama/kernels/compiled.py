"""The step of decoding one row on a CPU as one compiled function (Numba).

The step is a few hundred small operations. One by one, Python and PyTorch take longer for them than
the processor. Here they are plain loops that read like the equations, and become machine code once:
in some seconds, after that from a cache on the disk.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba import prange
from numba.extending import overload
from torch import nn

from base_llama import replace
from minllama.inference.cache import KVCache
from minllama.kernels.quantize import (
    Int8Product,
    PackedEmbedding,
    PackedLlama,
    Product,
    prepare_for_decoding,
    quantized,
)
from rope import rotary_table

if TYPE_CHECKING:
    from llama import Llama

FAST = {"reassoc", "contract", "nsz"}  # sums in any order, so that they are vectorized; NaN stays


def as_float(weight: Any) -> Any:
    """A weight as float32: of bfloat16 the bits, as uint16, or an int8 number."""


@overload(as_float, inline="always")
def _as_float(weight):
    if weight == numba.types.uint16:
        return lambda weight: np.uint32(np.uint32(weight) << np.uint32(16)).view(np.float32)
    return lambda weight: np.float32(weight)


@numba.njit(fastmath=FAST, inline="always")
def norm(x, weight, eps, out):
    """RMSNorm: x / √(mean(x²) + eps) · weight."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    factor = np.float32(1) / np.sqrt(total / np.float32(len(x)) + eps)
    for i in range(len(x)):
        out[i] = x[i] * factor * weight[i]


@numba.njit(fastmath=FAST, inline="always")
def dot(row, x):
    """Σ row · x, in float32."""
    total = np.float32(0)
    for i in range(len(x)):
        total += as_float(row[i]) * x[i]
    return total


def step(
    token,
    position,
    weights,
    scales,
    norms,
    rotations,
    cache,
    eps,
    logits,
):
    """The logits of what follows a token.

    Args:
        token, position: its id, and how many there were before it.
        weights: embedding `(vocab_size, dim)`, then for all layers at once query, key and value
            `(n_layers, dim + 2 · kv_dim, dim)`, output `(n_layers, dim, dim)`, w1 and w3
            `(n_layers, 2 · hidden_dim, dim)`, w2 `(n_layers, dim, hidden_dim)`, and the head
            `(vocab_size, dim)`.
        scales: what the numbers of each row of these, but for the embedding, are multiplied by.
        norms: weights of the norms, two of each layer and the last, `(2 · n_layers + 1, dim)`.
        rotations: cosine and sine, `(max_seq_len, head_dim / 2, 2)`.
        cache: keys and values `(n_layers, 2, n_kv_heads, max_len, head_dim)`; the
            token's are added.
        logits: `(vocab_size,)`, written.
    """
    embedding, w_qkv, w_output, w1_w3, w2, head = weights
    s_qkv, s_output, s1_s3, s2, s_head = scales
    n_layers, _, n_kv_heads, _, head_dim = cache.shape
    dim = embedding.shape[1]
    hidden_dim = w2.shape[2]
    n_heads = dim // head_dim
    n_rotated = n_heads + n_kv_heads
    n_seen = position + 1
    x = np.empty(dim, np.float32)
    normed = np.empty(dim, np.float32)
    heads = np.empty((n_heads + 2 * n_kv_heads, head_dim), np.float32)
    attended = np.empty((n_heads, head_dim), np.float32)
    scores = np.empty((n_heads, n_seen), np.float32)
    gated = np.empty(hidden_dim, np.float32)
    flat_heads, flat_attended = heads.reshape(-1), attended.reshape(-1)

    for i in range(dim):
        x[i] = as_float(embedding[token, i])
    for layer in range(n_layers):
        norm(x, norms[2 * layer], eps, normed)
        for i in prange(w_qkv.shape[1]):
            flat_heads[i] = dot(w_qkv[layer, i], normed) * s_qkv[layer, i]
        for h in range(n_rotated):
            for i in range(head_dim // 2):
                cos, sin = rotations[position, i, 0], rotations[position, i, 1]
                a, b = heads[h, 2 * i], heads[h, 2 * i + 1]
                heads[h, 2 * i] = a * cos - b * sin
                heads[h, 2 * i + 1] = a * sin + b * cos
        for h in range(n_kv_heads):
            for i in range(head_dim):
                cache[layer, 0, h, position, i] = heads[n_heads + h, i]
                cache[layer, 1, h, position, i] = heads[n_rotated + h, i]
        for h in prange(n_heads):
            kv = h * n_kv_heads // n_heads
            attend(heads[h], cache[layer, 0, kv], cache[layer, 1, kv], scores[h], attended[h])
        for i in prange(dim):
            x[i] += dot(w_output[layer, i], flat_attended) * s_output[layer, i]
        norm(x, norms[2 * layer + 1], eps, normed)
        for i in prange(hidden_dim):
            gate = dot(w1_w3[layer, i], normed) * s1_s3[layer, i]
            up = dot(w1_w3[layer, hidden_dim + i], normed) * s1_s3[layer, hidden_dim + i]
            gated[i] = gate / (np.float32(1) + np.exp(-gate)) * up
        for i in prange(dim):
            x[i] += dot(w2[layer, i], gated) * s2[layer, i]
    norm(x, norms[2 * n_layers], eps, normed)
    for i in prange(len(logits)):
        logits[i] = dot(head[i], normed) * s_head[i]


@numba.njit(fastmath=FAST)
def attend(query, keys, values, scores, out):
    """softmax(query · keyᵀ / √head_dim) · value of one head.

    Args:
        query: `(head_dim,)`.
        keys, values: `(max_len, head_dim)`.
        scores: `(n_seen,)`, written over.
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
        share = scores[t] / total
        for i in range(len(out)):
            out[i] += share * values[t, i]


class CompiledLlama(PackedLlama):
    """A causal model on a CPU, packed, whose step for one row is compiled.

    Prompts and several rows go through PyTorch, with the same weights. Numba starts as many threads
    as `NUMBA_NUM_THREADS` said when it was imported; beside another busy process those that have
    nothing to do slow the others down.

    Args:
        llama: is packed in place.
        dtype: of the weights, as for `prepare_for_decoding`.
    """

    def __init__(self, llama: Llama, dtype: str):
        weights = StackedWeights(llama, dtype)
        super().__init__(prepare_for_decoding(llama, dtype, weights.put))
        layers = llama.layers
        norms = [norm.weight for layer in layers for norm in (layer.attention_norm, layer.ffn_norm)]
        embedding = llama.tok_embeddings.weight
        if self.config.tie_embeddings and dtype != "int8":  # one copy is enough
            embedding = weights.stacks[-1]
            same = nn.Embedding.from_pretrained(embedding)
            replace(llama, "tok_embeddings", PackedEmbedding(same))
        elif embedding.dtype == torch.float16:  # which Numba does not have on a CPU
            embedding = embedding.float()
        config = self.config
        table = rotary_table(
            config.dim // config.n_heads, config.max_seq_len, config.rope_theta, embedding.device
        )
        self.constants = (
            tuple(as_array(tensor) for tensor in (embedding, *weights.stacks)),
            tuple(as_array(tensor) for tensor in weights.scales),
            as_array(torch.stack([*norms, llama.norm.weight])),
            as_array(torch.view_as_real(table)),
        )
        self.eps = np.float32(config.layer_norm_eps)
        self.logits = torch.empty(1, llama.vocab_size)
        self.row = self.logits[0].numpy()  # the same memory
        self.n_threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        self._compile()

    def next_logits(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """As `Llama.next_logits`. What is returned for one row is written over by the next step."""
        if tokens.numel() > 1:
            return super().next_logits(tokens, cache)
        self._step(int(tokens), cache.lengths[0], cache.data[:, :, 0])
        cache.end(1)
        return self.logits

    def _step(self, token: int, position: int, cache: torch.Tensor) -> None:
        numba.set_num_threads(self.n_threads)
        self.compiled(token, position, *self.constants, cache.numpy(), self.eps, self.row)

    def _compile(self) -> None:
        """Make the step machine code, or take it from the disk if it is there."""
        cache = KVCache(self.config, 1, 1)
        try:
            self.compiled = numba.njit(step, parallel=True, fastmath=FAST, cache=True)
            self._step(0, 0, cache.data[:, :, 0])
        except Exception:  # a cache that is nowhere, full or damaged costs the time to compile
            self.compiled = numba.njit(step, parallel=True, fastmath=FAST)
            self._step(0, 0, cache.data[:, :, 0])


class StackedWeights:
    """The weights of all layers, each kind in one tensor, which fills as the model is packed.

    Attributes:
        stacks: `(n_layers, out, in)` of query, key and value, output, w1 and w3, w2, and the head's
            `(out, in)`.
        scales: of the rows of each, `(n_layers, out)` and `(out,)`, float32; 1 but for int8.
    """

    def __init__(self, llama: Llama, dtype: str):
        config = llama.config
        n_kv_heads = config.n_kv_heads or config.n_heads
        kv_dim = n_kv_heads * (config.dim // config.n_heads)
        sizes = [(config.dim + 2 * kv_dim, config.dim), (config.dim, config.dim)]
        sizes += [(2 * config.ffn_dim, config.dim), (config.dim, config.ffn_dim)]
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, torch.int8)
        shapes = [(config.n_layers, *size) for size in sizes] + [(config.vocab_size, config.dim)]
        self.stacks = [empty_in_huge_pages(shape, self.dtype) for shape in shapes]
        self.scales = [torch.ones(shape[:-1]) for shape in shapes]
        *of_layers, head = zip(self.stacks, self.scales, strict=True)
        slots = [(stack[i], scale[i]) for i in range(config.n_layers) for stack, scale in of_layers]
        self._slots = iter([*slots, head])

    def put(self, weight: torch.Tensor) -> Product:
        """Store the next weight, in the order of `prepare_for_decoding`; return its product."""
        stack, scale = next(self._slots)
        if self.dtype == torch.int8:
            numbers, factors = quantized(weight)
            stack.copy_(numbers)
            scale.copy_(factors)
            return Int8Product(stack, scale)
        stack.copy_(weight)
        return lambda x: F.linear(x.to(stack.dtype), stack)


def empty_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in NumPy's memory, for which NumPy asks Linux for pages of 2 MiB.

    A step reads all weights. With large pages fewer addresses have to be looked up for that.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(n_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64  # at the start of a cache line
    return torch.from_numpy(memory[start : start + n_bytes]).view(dtype).view(shape)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's numbers for Numba, not copied; of bfloat16 the bits."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
