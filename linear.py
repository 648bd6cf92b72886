"""The linear layer of the model: `nn.Linear`, with float32 products from oneDNN on a CPU."""

import torch
import torch.nn.functional as F
from torch import nn

MIN_ROWS = 8  # for fewer, MKL is as fast
HAS_ONEDNN = torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """x Wᵀ, without a bias."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

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
        HAS_ONEDNN
        and x.device.type == "cpu"
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and x.shape[-1] == weight.shape[1]
        and x.dtype == weight.dtype == torch.float32
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
