"""A model for decoding: weights laid out for their kernels, and if wanted in lower precision.

Decoding one token reads every weight once and does little else, so its speed is that of reading
memory. `prepare_for_decoding` replaces the sub-layers and the output head of a model by forms that
read faster, or read less. The embedding stays where it is. A packed weight takes the place of the
original, one layer after the other, so that at no time both are in memory as a whole. On a CPU
small weights are kept twice, in the order that is best for one row and in that for several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from base_llama import replace
from minllama.inference.cache import KVCache
from minllama.kernels.cpu import FastAttention
from rope import apply_rotary_emb

if TYPE_CHECKING:
    from llama import Attention, FeedForward, Llama, RMSNorm

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a number
DTYPES = tuple(BYTES)
Product = Callable[[torch.Tensor], torch.Tensor]  # x `(…, in)` to x Wᵀ `(…, out)`
Pack = Callable[[torch.Tensor], Product]  # W `(out, in)` to its product


def prepare_for_decoding(llama: Llama, dtype: str = "float32", packed: Pack | None = None) -> Llama:
    """Convert a model for inference, in place, on the device where it will run.

    It can be neither trained nor saved nor moved afterwards. Products that read the same input
    (query, key and value; w1 and w3) become one. In lower precision logits are bfloat16 numbers, or
    come from products in it, so that the likeliest tokens can tie.

    Args:
        dtype: of the weights, one of `DTYPES`. int8 has a scale per output channel.
        packed: what makes a product of a weight, in place of this module's own ways. It gets those
            of each layer in the order query, key and value; output; w1 and w3; w2; then the head.
    """
    ways = {"float32": packed_float32, "bfloat16": packed_bfloat16, "int8": packed_int8}
    packed = packed or ways[dtype]
    with torch.no_grad():
        for layer in llama.layers:
            replace(layer, "attention", PackedAttention(layer.attention, packed))
            replace(layer, "feed_forward", PackedFeedForward(layer.feed_forward, packed))
            for name in ("attention_norm", "ffn_norm"):
                replace(layer, name, PackedNorm(layer.get_submodule(name)))
        replace(llama, "tok_embeddings", PackedEmbedding(llama.tok_embeddings))
        replace(llama, "norm", PackedNorm(llama.norm))
        replace(llama, "output", PackedLinear(llama.output, packed))
    return llama


class PackedLlama(nn.Module):
    """A packed model for `decode`, whose step may be another than that of its modules."""

    def __init__(self, llama: Llama):
        super().__init__()
        self.llama, self.config = llama, llama.config

    @property
    def tok_embeddings(self) -> nn.Module:
        return self.llama.tok_embeddings

    def hidden_states(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Llama.hidden_states`."""
        return self.llama.hidden_states(*args, **kwargs)

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `Llama.output`."""
        return self.llama.output(hidden)

    def next_logits(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """As `Llama.next_logits`."""
        return self.llama.next_logits(tokens, cache)


class PackedAttention(FastAttention):
    """`Attention` for inference, with query, key and value from one product."""

    def __init__(self, attention: Attention, packed: Pack):
        super().__init__(attention)
        parts = (attention.compute_query, attention.compute_key, attention.compute_value)
        self.n_heads = [part.out_features // self.head_dim for part in parts]
        self.query_key_value = packed(torch.cat([part.weight for part in parts]))
        self.output = packed(attention.compute_output.weight)
        del self.compute_query, self.compute_key, self.compute_value, self.compute_output

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """`(batch, seqlen, dim)` to the same shape."""
        heads = self.query_key_value(x).view(*x.shape[:-1], -1, self.head_dim)
        query, key, value = torch.split_with_sizes(heads, self.n_heads, dim=2)
        query, key = apply_rotary_emb(
            query,
            key,
            self.head_dim,
            self.config.max_seq_len,
            self.config.rope_theta,
            start=0 if cache is None else cache.start,
        )
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        mask = None
        if cache is not None:
            key, value = cache.update(self.layer_id, key, value)
            query, mask = query.type_as(key), cache.mask
        output = self.compute_query_key_value_scores(query, key, value, mask)
        return self.output(output.transpose(1, 2).reshape(x.shape))


class PackedFeedForward(nn.Module):
    """`FeedForward` for inference, with w1 and w3 in one product."""

    def __init__(self, feed_forward: FeedForward, packed: Pack):
        super().__init__()
        self.w1_w3 = packed(torch.cat((feed_forward.w1.weight, feed_forward.w3.weight)))
        self.w2 = packed(feed_forward.w2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, dim)` to the same shape."""
        gate, up = self.w1_w3(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class PackedEmbedding(nn.Module):
    """`nn.Embedding` whose rows become float32 when they are looked up."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.weight = embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Ids `(batch, seqlen)` to `(batch, seqlen, dim)`."""
        return F.embedding(tokens, self.weight).float()


class PackedNorm(nn.Module):
    """`RMSNorm` of float32 in one operation."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.weight = nn.Parameter(norm.weight.float())
        self.eps, self.shape = norm.eps, norm.weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, dim)` to the same shape."""
        return torch.rms_norm(x.float(), self.shape, self.weight, self.eps)


class PackedLinear(nn.Module):
    """`nn.Linear` without a bias, for inference."""

    def __init__(self, linear: nn.Linear, packed: Pack):
        super().__init__()
        self.product = packed(linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, in_features)` to `(…, out_features)`."""
        return self.product(x)


def packed_float32(weight: torch.Tensor) -> Product:
    """The product with a weight `(out, in)` in float32."""
    return packed_float(weight.float())


def packed_float(weight: torch.Tensor) -> Product:
    """The product with a weight `(out, in)` in its own precision, float32 or bfloat16."""
    several_rows = FloatProduct(weight.detach())
    if not is_small(weight) or not takes_one_row(weight):
        return several_rows
    return OneRowProduct(weight, None, several_rows)


def packed_bfloat16(weight: torch.Tensor) -> Product:
    """The product with a weight `(out, in)`, rounded to bfloat16."""
    return packed_float(weight.bfloat16())


def packed_int8(weight: torch.Tensor) -> Product:
    """The product with a weight `(out, in)`, rounded to 127 steps of its row's magnitude."""
    numbers, scale = quantized(weight)
    several_rows = Int8Product(numbers, scale)
    if not takes_one_row(weight) or (several_rows.has_kernel and not is_small(weight)):
        return several_rows
    return OneRowProduct(numbers, scale, several_rows)


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `(out, in)` as int8 numbers and the scale of each row, `(out,)`."""
    scale = weight.abs().amax(dim=1).float().clamp(min=1e-12) / 127
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, len(weight), BLOCK_ROWS):  # no float32 copy of the whole
        part = slice(start, start + BLOCK_ROWS)
        numbers[part] = (weight[part].float() / scale[part, None]).round().to(torch.int8)
    return numbers, scale


class FloatProduct:
    """x Wᵀ in the weight's own precision, `(…, in)` to `(…, out)`.

    On a CPU oneDNN lays the weight out, once, as its product wants to read it.

    Args:
        weight: `(out, in)`, float32 or bfloat16.
    """

    def __init__(self, weight: torch.Tensor):
        self.dtype = weight.dtype
        self.is_packed = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if self.dtype == torch.bfloat16:  # oneDNN has it on recent processors only
            self.is_packed = self.is_packed and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if self.is_packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)


class Int8Product:
    """x Wᵀ with W = diag(scale) Q, `(…, in)` to `(…, out)`; products in bfloat16.

    Args:
        quantized: Q, int8 `(out, in)`.
        scale: `(out,)`.
    """

    MAX_ROWS = 32  # for more, a bfloat16 copy of the weight pays

    def __init__(self, quantized: torch.Tensor, scale: torch.Tensor):
        self.quantized = quantized
        self.scale = scale.bfloat16()
        # PyTorch's int8 kernel reads past the end of rows that are no multiple of its vectors.
        self.has_kernel = quantized.device.type == "cpu" and quantized.shape[1] % 32 == 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.bfloat16().reshape(-1, x.shape[-1])
        if self.has_kernel and len(rows) <= self.MAX_ROWS:
            y = torch._weight_int8pack_mm(rows, self.quantized, self.scale)
        else:
            y = F.linear(rows, self.quantized.bfloat16()) * self.scale
        return y.view(*x.shape[:-1], -1)


SMALL = 1 << 21  # numbers; for larger weights the products of several rows are as fast for one
BLOCK_ROWS = 1024  # that are quantized at a time


def is_small(weight: torch.Tensor) -> bool:
    """Whether a weight may be in memory twice."""
    return weight.numel() <= SMALL


N_BLOCKS = 8  # that a product of one row is cut into, to keep as many threads busy


def takes_one_row(weight: torch.Tensor) -> bool:
    """Whether `OneRowProduct` takes a weight: it is on the CPU and can be cut into blocks."""
    return weight.device.type == "cpu" and len(weight) % N_BLOCKS == 0


class OneRowProduct:
    """x Wᵀ for a single row x on a CPU, where reading W is what takes the time.

    The product is the sum of Wᵀ's rows weighted by the elements of x: an embedding bag. Its kernel
    (FBGEMM) streams through the rows, vectorized and prefetching, and spreads bags over threads. So
    Wᵀ is stored in column blocks, one under the other, with one bag for each.

    Args:
        weight: `(out, in)`, float32 or bfloat16, or int8 that stands for weight · scale.
        scale: `(out,)` for int8, else None.
        several_rows: the product that takes over where x has more than one row.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor | None, several_rows: Product):
        self.several_rows = several_rows
        self.scale = scale
        self.in_features = weight.shape[1]
        self.dtype = torch.float32 if scale is not None else weight.dtype
        blocks = weight.detach().view(N_BLOCKS, -1, self.in_features).transpose(1, 2)
        self.table = blocks.reshape(N_BLOCKS * self.in_features, -1)
        if scale is not None:
            # The kernel reads each row as scale · uint8 + bias, with these two behind the row.
            shifted = (self.table.to(torch.int16) + 128).to(torch.uint8)
            scale_and_bias = torch.tensor([1.0, -128.0]).view(torch.uint8)
            self.table = torch.cat((shifted, scale_and_bias.expand(len(shifted), 8)), dim=1)
        self.indices = torch.arange(len(self.table))
        self.offsets = torch.arange(0, len(self.table) + 1, self.in_features)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() != self.in_features:
            return self.several_rows(x)
        row = x.view(-1) if x.dtype == self.dtype else x.view(-1).to(self.dtype)
        factors = torch.cat((row,) * N_BLOCKS)
        if self.scale is None:
            y, *_ = torch.embedding_bag(
                self.table,
                self.indices,
                self.offsets,
                mode=0,  # the sum
                per_sample_weights=factors,
                include_last_offset=True,
            )
        else:
            y = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default(
                self.table,
                self.indices,
                self.offsets,
                per_sample_weights=factors,
                include_last_offset=True,
            )
            y = y.view(-1).mul_(self.scale)
        return y.view(*x.shape[:-1], -1)
