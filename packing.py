"""Linear layers for fast inference: laid out for their kernel, and if wanted in lower precision.

Decoding one token reads every weight once and does little else, so its speed is that of reading
memory. `pack` replaces a model's `nn.Linear`s by functions that read faster, or read less. Norms
and the embedding look-up stay as they are. On a CPU the weights are kept twice, in the order that
is best for one row and in that for several: what is saved is time, not memory.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from llama import Llama

DTYPES = ("float32", "bfloat16", "int8")


def pack(llama: Llama, dtype: str = "float32") -> Llama:
    """Convert a model for inference, in place, on the device where it will run.

    It can be neither trained nor saved nor moved afterwards. Products that read the same input
    (query, key and value; w1 and w3) become one. In lower precision logits are bfloat16 numbers, or
    come from products in it, so that the likeliest tokens can tie.

    Args:
        dtype: of the weights, one of `DTYPES`. int8 has a scale per output channel.
    """
    linear = {"float32": float_linear, "bfloat16": bfloat16_linear, "int8": int8_linear}[dtype]
    for layer in llama.layers:
        join(layer.attention, ("compute_query", "compute_key", "compute_value"), linear)
        replace(layer.attention, "compute_output", linear)
        join(layer.feed_forward, ("w1", "w3"), linear)
        replace(layer.feed_forward, "w2", linear)
    replace(llama, "output", linear)
    return llama


Linear = Callable[[torch.Tensor], torch.Tensor]  # x `(…, in)` to x Wᵀ `(…, out)`


def replace(module: nn.Module, name: str, linear: Callable[[torch.Tensor], Linear]) -> None:
    """Put a function in the place of an `nn.Linear`; a module would cost a call's overhead."""
    weight = getattr(module, name).weight.detach()
    delattr(module, name)
    setattr(module, name, linear(weight))


def join(module: nn.Module, names: Sequence[str], linear: Callable) -> None:
    """Let `module.project` take one product where it took several of the same input."""
    weights = [getattr(module, name).weight.detach() for name in names]
    widths = [len(weight) for weight in weights]
    joined = linear(torch.cat(weights))
    module.project = lambda x: torch.split_with_sizes(joined(x), widths, dim=-1)
    for name in names:
        delattr(module, name)


def float_linear(weight: torch.Tensor) -> Linear:
    packed = PackedLinear(weight)
    return OneRowLinear(weight, None, packed) if OneRowLinear.takes(weight) else packed


def bfloat16_linear(weight: torch.Tensor) -> Linear:
    return float_linear(weight.bfloat16())


def int8_linear(weight: torch.Tensor) -> Linear:
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    quantized = (weight / scale[:, None]).round().to(torch.int8)
    linear = Int8Linear(quantized, scale)
    return OneRowLinear(quantized, scale, linear) if OneRowLinear.takes(weight) else linear


class PackedLinear:
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


class Int8Linear:
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
        rows = x.bfloat16().flatten(0, -2)
        if self.has_kernel and len(rows) <= self.MAX_ROWS:
            y = torch._weight_int8pack_mm(rows, self.quantized, self.scale)
        else:
            y = F.linear(rows, self.quantized.bfloat16()) * self.scale
        return y.view(*x.shape[:-1], -1)


class OneRowLinear:
    """x Wᵀ for a single row x on a CPU, where reading W is what takes the time.

    The product is the sum of Wᵀ's rows weighted by the elements of x: an embedding bag. Its kernel
    (FBGEMM) streams through the rows, vectorized and prefetching, and spreads bags over threads. So
    Wᵀ is stored in column blocks, one under the other, with one bag for each.

    Args:
        weight: `(out, in)`, float32, or int8 that stands for weight · scale.
        scale: `(out,)` for int8, else None.
        several_rows: the layer that takes over where x has more than one row.
    """

    N_BLOCKS = 8  # keeps as many threads busy

    @classmethod
    def takes(cls, weight: torch.Tensor) -> bool:
        """Whether a weight is on the CPU and can be cut into blocks."""
        return weight.device.type == "cpu" and len(weight) % cls.N_BLOCKS == 0

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor | None, several_rows: Linear):
        self.several_rows = several_rows
        self.scale = scale
        self.in_features = weight.shape[1]
        self.dtype = torch.float32 if scale is not None else weight.dtype
        blocks = weight.view(self.N_BLOCKS, -1, self.in_features).transpose(1, 2)
        self.table = blocks.reshape(self.N_BLOCKS * self.in_features, -1)
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
        factors = torch.cat((row,) * self.N_BLOCKS)
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
