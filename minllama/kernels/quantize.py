"""Prepare a model for decoding: weights in a layout that is read fast, and in fewer bits.

Decoding a token reads every weight once and does little else, so its speed is that of memory.
`prepare_for_decoding` replaces the layers of a model by modules that read faster, or read less.
It goes layer by layer, so that the model is never in memory twice. On a CPU small weights are kept
in two layouts, one for batch-1 decoding and one for batches.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from base_llama import replace
from llama import Attention, Llama, LlamaLayer
from minllama.inference.cache import KVCache
from minllama.kernels.cpu import FastAttention, FastNorm
from rope import apply_rotary_emb
from utils import has_fast_bfloat16

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # per weight
DTYPES = tuple(BYTES)
BLOCK_ROWS = 1024  # rows that are quantized at a time, so that no float32 copy of all exists
MAX_NUMEL_TWICE = 1 << 21  # larger weights are kept in one layout, as fast for any batch
MAX_INT8_ROWS = 32  # for larger batches a bfloat16 copy of an int8 weight pays
N_BLOCKS = 8  # of a batch-1 product, to keep as many threads busy


def prepare_for_decoding(llama: Llama, dtype: str = "float32") -> Llama:
    """Convert a model for inference, in place, on the device where it will run.

    Afterwards it can be neither trained nor saved nor moved. Products that read the same input
    (query, key and value; w1 and w3) become one. In lower precision logits are bfloat16, or come
    from bfloat16 products, so that the most likely tokens can tie.

    Args:
        dtype: precision of the weights, one of `DTYPES`. int8 has a scale for each output
            channel. Norms are float32, and the embedding stays as it is.
    """
    with torch.no_grad():
        for layer in layers_of(llama):
            replace_layer(layer, [make_linear(weight, dtype) for weight in fused_weights(layer)])
        replace_ends(llama, make_linear(llama.output.weight, dtype))
    return llama


def layers_of(llama: Llama) -> list[LlamaLayer]:
    """The layers with their type, which `nn.ModuleList` does not know."""
    return cast("list[LlamaLayer]", list(llama.layers))


def fused_weights(layer: LlamaLayer) -> Iterator[torch.Tensor]:
    """The weights of query, key and value; of the output; of w1 and w3; and of w2, in turn."""
    attention, feed_forward = layer.attention, layer.feed_forward
    heads = (attention.compute_query, attention.compute_key, attention.compute_value)
    yield torch.cat([linear.weight for linear in heads])
    yield attention.compute_output.weight
    yield torch.cat((feed_forward.w1.weight, feed_forward.w3.weight))
    yield feed_forward.w2.weight


def replace_layer(layer: LlamaLayer, linears: Sequence[nn.Module]) -> None:
    """Make a layer use linear modules of its `fused_weights`."""
    query_key_value, output, w1_w3, w2 = linears
    attention = DecodingAttention(layer.attention, query_key_value, output)
    replace(layer, "attention", attention)
    replace(layer, "feed_forward", DecodingFeedForward(w1_w3, w2))
    replace(layer, "attention_norm", FastNorm(layer.attention_norm.float()))
    replace(layer, "ffn_norm", FastNorm(layer.ffn_norm.float()))


def replace_ends(llama: Llama, head: nn.Module) -> None:
    """Replace embedding, last norm and output head."""
    embedding = DecodingEmbedding.from_pretrained(llama.tok_embeddings.weight)
    replace(llama, "tok_embeddings", embedding)
    replace(llama, "norm", FastNorm(llama.norm.float()))
    replace(llama, "output", head)


class DecodingAttention(FastAttention):
    """`Attention` for inference, with query, key and value from one product."""

    def __init__(self, attention: Attention, query_key_value: nn.Module, output: nn.Module):
        super().__init__(attention)
        del self.compute_query, self.compute_key, self.compute_value, self.compute_output
        self.query_key_value, self.output = query_key_value, output
        self.n_heads = [self.n_local_heads, self.n_local_kv_heads, self.n_local_kv_heads]

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """`(batch, seqlen, dim)` to the same shape."""
        heads = self.query_key_value(x).view(*x.shape[:-1], -1, self.head_dim)
        query, key, value = heads.split(self.n_heads, dim=2)  # (batch, seqlen, n, head_dim)
        start = 0 if cache is None else cache.start
        max_seq_len, theta = self.config.max_seq_len, self.config.rope_theta
        query, key = apply_rotary_emb(query, key, self.head_dim, max_seq_len, theta, start)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        mask = None
        if cache is not None:
            key, value = cache.update(self.layer_id, key, value)
            query, mask = query.type_as(key), cache.mask
        output = self.compute_query_key_value_scores(query, key, value, mask)
        return self.output(output.transpose(1, 2).flatten(2))


class DecodingFeedForward(nn.Module):
    """`FeedForward` for inference, with w1 and w3 in one product."""

    def __init__(self, w1_w3: nn.Module, w2: nn.Module):
        super().__init__()
        self.w1_w3, self.w2 = w1_w3, w2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, dim)` to the same shape."""
        gate, up = self.w1_w3(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class DecodingEmbedding(nn.Embedding):
    """An embedding in any precision that returns float32."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Ids `(batch, seqlen)` to `(batch, seqlen, dim)`."""
        return super().forward(tokens).float()


def make_linear(weight: torch.Tensor, dtype: str) -> nn.Module:
    """The fastest linear module for a weight `(out, in)`, in a precision and on its device."""
    linear: FloatLinear | Int8Linear
    scale = None
    if dtype == "int8":
        weight, scale = quantize(weight)
        linear = Int8Linear(weight, scale)
    else:
        weight = weight.float() if dtype == "float32" else weight.bfloat16()
        linear = FloatLinear(weight)
    can_be_cut = weight.device.type == "cpu" and len(weight) % N_BLOCKS == 0
    is_slow = isinstance(linear, Int8Linear) and not linear.has_kernel
    if can_be_cut and (is_slow or weight.numel() <= MAX_NUMEL_TWICE):
        return Batch1Linear(weight, scale, linear)
    return linear


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight `(out, in)` to int8 numbers times a scale `(out,)` for each output channel."""
    scale = weight.abs().amax(dim=1).float().clamp(min=1e-12) / 127
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, len(weight), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        numbers[rows] = (weight[rows].float() / scale[rows, None]).round().to(torch.int8)
    return numbers, scale


class FloatLinear(nn.Module):
    """x Wᵀ in the weight's own precision.

    Args:
        weight: `(out, in)`, float32 or bfloat16.
        reorder: copy the weight, on a CPU, into the layout that oneDNN's product reads.
    """

    def __init__(self, weight: torch.Tensor, *, reorder: bool = True):
        super().__init__()
        self.weight, self.dtype = weight.detach(), weight.dtype
        has_onednn = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        is_fast = self.dtype == torch.float32 or has_fast_bfloat16(weight.device.type)
        self.is_reordered = reorder and has_onednn and is_fast
        if self.is_reordered:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, in)` to `(…, out)`."""
        x = x.to(self.dtype)
        if self.is_reordered:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)


class Int8Linear(nn.Module):
    """x Wᵀ with W = diag(scale) · weight, in bfloat16.

    Args:
        weight: int8 `(out, in)`.
        scale: `(out,)`.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor):
        super().__init__()
        self.weight, self.scale = weight, scale.bfloat16()
        # PyTorch's int8 kernel reads past the end of rows that do not fill its vectors.
        self.has_kernel = weight.device.type == "cpu" and weight.shape[1] % 32 == 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, in)` to `(…, out)`."""
        rows = x.bfloat16().reshape(-1, x.shape[-1])
        if self.has_kernel and len(rows) <= MAX_INT8_ROWS:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.bfloat16()) * self.scale
        return y.view(*x.shape[:-1], -1)


class Batch1Linear(nn.Module):
    """x Wᵀ for a single row x on a CPU, where the time goes into reading W.

    The product is the sum of Wᵀ's rows weighted by the elements of x: an embedding bag. Its kernel
    (FBGEMM) streams through the rows, vectorized and prefetching, and gives each thread bags of its
    own. So the column blocks of Wᵀ are stored one below the other, with a bag for each.

    Args:
        weight: `(out, in)`, float32 or bfloat16, or int8 with a scale.
        scale: `(out,)` for int8, else None.
        batch_linear: takes over if x has more than one row.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor | None, batch_linear: nn.Module):
        super().__init__()
        self.scale, self.batch_linear = scale, batch_linear
        self.in_features = weight.shape[1]
        self.dtype = weight.dtype if scale is None else torch.float32
        blocks = weight.detach().view(N_BLOCKS, -1, self.in_features).transpose(1, 2)
        self.table = blocks.reshape(N_BLOCKS * self.in_features, -1)
        if scale is not None:
            # The kernel reads a row as scale · uint8 + bias, with both after the row.
            shifted = (self.table.to(torch.int16) + 128).to(torch.uint8)
            scale_and_bias = torch.tensor([1.0, -128.0]).view(torch.uint8)
            self.table = torch.cat((shifted, scale_and_bias.expand(len(shifted), 8)), dim=1)
        self.indices = torch.arange(len(self.table))
        self.offsets = torch.arange(0, len(self.table) + 1, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, in)` to `(…, out)`."""
        if x.numel() != self.in_features:
            return self.batch_linear(x)
        row = x.view(-1) if x.dtype == self.dtype else x.view(-1).to(self.dtype)
        factors = torch.cat((row,) * N_BLOCKS)
        bags = (self.table, self.indices, self.offsets)
        if self.scale is None:
            y, *_ = torch.embedding_bag(
                *bags, mode=0, per_sample_weights=factors, include_last_offset=True
            )  # mode 0 is the sum
        else:
            y = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default(
                *bags, per_sample_weights=factors, include_last_offset=True
            )
            y = y.view(-1).mul_(self.scale)
        return y.view(*x.shape[:-1], -1)
