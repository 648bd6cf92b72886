"""What is faster on a CPU: products, short attention, norms, and freed memory that is kept.

All compute the same as the plain lines of `llama.py`, but for rounding.
"""

import ctypes
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from base_llama import replace
from llama import RMSNorm, ScaledDotProductAttention

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
MIN_ROWS = 8  # for fewer, MKL's float32 products are as fast as oneDNN's
MAX_PLAIN = 512  # tokens up to which attention by plain products is faster in bfloat16


def accelerate(model: nn.Module) -> None:
    """Replace linear layers, attention and norms by what is faster on a CPU, and as fast elsewhere.

    Do this when everything else has been put into the model. It can be trained and saved as before.

    Args:
        model: a Llama, or what holds one; layers with a bias are left alone.
    """
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.bias is None:
            replace(model, name, OneDNNLinear(module))
        elif type(module) is ScaledDotProductAttention:
            replace(model, name, ShortAttention(module))
        elif type(module) is RMSNorm:
            replace(model, name, FusedNorm(module))


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors give back for the next ones.

    By default large blocks go back to the system at once, and come again page by page, zeroed: in
    training up to a fifth of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


class FusedNorm(RMSNorm):
    """The norm of float32 numbers in one operation, on every device."""

    def __init__(self, norm: RMSNorm):
        super().__init__(len(norm.weight), norm.eps)
        self.weight = norm.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, dim)` to the same shape."""
        if x.dtype == self.weight.dtype == torch.float32:
            return torch.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return super().forward(x)


class OneDNNLinear(nn.Module):
    """x Wᵀ, with float32 products from oneDNN. W stays the parameter that it was."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, in_features)` to `(…, out_features)`."""
        return product(x, self.weight)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x Wᵀ: `(…, in)` and `(out, in)` to `(…, out)`.

    PyTorch takes float32 products on a CPU from MKL, which does not use the widest instructions of
    processors other than Intel's. oneDNN, which PyTorch brings too, does. The results differ in
    rounding only.
    """
    if (
        x.device.type == "cpu"
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and x.shape[-1] == weight.shape[1]
        and x.dtype == weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    ):
        return OneDNNProduct.apply(x, weight)
    return F.linear(x, weight)


class OneDNNProduct(torch.autograd.Function):
    """x Wᵀ in float32; its derivatives are such products themselves."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`(…, in)` and `(out, in)` to `(…, out)`."""
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = OneDNNProduct.apply(grad, weight.t())
        if ctx.needs_input_grad[1]:
            weight_grad = OneDNNProduct.apply(grad.flatten(0, -2).t(), x.flatten(0, -2).t())
        return x_grad, weight_grad

    @staticmethod
    def jvp(ctx, x_tangent: torch.Tensor, weight_tangent: torch.Tensor) -> torch.Tensor:
        x, weight = ctx.saved_tensors
        return F.linear(x_tangent, weight) + F.linear(x, weight_tangent)


class ShortAttention(ScaledDotProductAttention):
    """Attention by plain products for short rows in bfloat16; for all others as it was.

    There PyTorch's CPU kernel takes several times as long, above all backward.
    """

    def __init__(self, attention: ScaledDotProductAttention):
        super().__init__(attention.config)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments and result are those of its base."""
        n, seqlen = query.shape[2], key.shape[2]
        is_short = mask is None and 1 < n <= seqlen <= MAX_PLAIN
        if not is_short or query.dtype != torch.bfloat16 or query.device.type != "cpu":
            return super().forward(query, key, value, mask)
        dropout_p = self.config.attention_dropout if self.training else 0.0
        return plain_attention(query, key, value, self.config.causal, dropout_p)


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, dropout_p: float
) -> torch.Tensor:
    """softmax(query · keyᵀ / √head_dim) · value, its softmax in float32.

    Args:
        query: `(batch, n_heads, n, head_dim)`, of the last n of seqlen positions.
        key, value: `(batch, n_kv_heads, seqlen, head_dim)`.

    Returns:
        as the query.
    """
    (n, head_dim), seqlen = query.shape[2:], key.shape[2]
    query = query / math.sqrt(head_dim)
    query = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # all that share a key together
    scores = (query @ key.transpose(-1, -2)).unflatten(2, (-1, n)).float()
    if causal:
        scores += scores.new_full((n, seqlen), -math.inf).triu(diagonal=1 + seqlen - n)
    weights = F.dropout(scores.softmax(dim=-1), dropout_p).type_as(value)
    return (weights.flatten(2, 3) @ value).unflatten(2, (-1, n)).flatten(1, 2)
