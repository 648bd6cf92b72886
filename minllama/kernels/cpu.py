"""Modules that are faster on a CPU, and memory that is kept when it is freed.

They compute the same as the plain modules of `llama.py`, except for rounding.
"""

import ctypes
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from base_llama import NoInitialWeights, replace
from llama import Attention, RMSNorm

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
MIN_ROWS = 8  # for fewer, MKL's float32 products are as fast as oneDNN's
MAX_PLAIN = 512  # tokens up to which plain attention is faster in bfloat16


def accelerate(model: nn.Module) -> None:
    """Replace linear layers, attention and norms by modules that are faster on a CPU.

    They share the parameters of those that they replace, and are as fast on other devices. A model
    is accelerated right after it is loaded: subclasses, which a method puts in, stay as they are.

    Args:
        model: a Llama, or a module that holds one; linear layers with a bias are left alone.
    """
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.bias is None:
            replace(model, name, FastLinear(module))
        elif type(module) is Attention:
            replace(model, name, FastAttention(module))
        elif type(module) is RMSNorm:
            replace(model, name, FastNorm(module))


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensors.

    By default it returns large blocks to the system at once and gets them back page by page,
    zeroed, which takes up to a fifth of a training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


class FastNorm(RMSNorm):
    """The norm of float32 numbers in one operation, on every device."""

    def __init__(self, norm: RMSNorm):
        super().__init__(len(norm.weight), norm.eps)
        self.weight = norm.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, dim)` to the same shape."""
        if x.dtype == self.weight.dtype == torch.float32:
            return torch.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return super().forward(x)


class FastLinear(nn.Linear):
    """x Wᵀ, with float32 products from oneDNN."""

    def __init__(self, linear: nn.Linear):
        with NoInitialWeights():
            super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, in_features)` to `(…, out_features)`."""
        return product(x, self.weight)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x Wᵀ: `(…, in)` and `(out, in)` to `(…, out)`.

    PyTorch takes float32 products on a CPU from MKL, which does not use the widest instructions of
    processors other than Intel's. oneDNN, which comes with PyTorch too, does.
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

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`(…, in)` and `(out, in)` to `(…, out)`."""
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = OneDNNProduct.apply(grad, weight.t())
        if ctx.needs_input_grad[1]:
            weight_grad = OneDNNProduct.apply(grad.flatten(0, -2).t(), x.flatten(0, -2).t())
        return x_grad, weight_grad


class FastAttention(Attention):
    """Attention by PyTorch's fused kernel, or plainly where that is faster.

    That is for short bfloat16 sequences on a CPU, where the kernel takes several times as long,
    above all backward.
    """

    def __init__(self, attention: Attention):
        with NoInitialWeights():
            super().__init__(attention.config, attention.layer_id)
        for name, part in attention.named_children():
            setattr(self, name, part)

    def compute_query_key_value_scores(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments and result are those of `Attention`."""
        n, seqlen = query.shape[2], key.shape[2]
        is_short = mask is None and n > 1 and seqlen <= MAX_PLAIN
        if is_short and query.dtype == torch.bfloat16 and query.device.type == "cpu":
            return super().compute_query_key_value_scores(query, key, value)
        causal = self.config.causal and mask is None
        if causal and 1 < n < seqlen:
            mask = torch.ones(n, seqlen, dtype=torch.bool, device=query.device).tril(seqlen - n)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.config.attention_dropout if self.training else 0.0,
            is_causal=causal and n == seqlen,
            enable_gqa=key.shape[1] != query.shape[1],
        )
