"""The linear layer of the model: `nn.Linear`, with float32 products from oneDNN on a CPU."""

import torch
from torch import nn


class Linear(nn.Linear):
    """x Wᵀ, without a bias.

    PyTorch takes float32 products on a CPU from MKL, which does not use the widest instructions of
    processors other than Intel's. oneDNN, which PyTorch brings too, does. The results differ in
    rounding only.
    """

    MIN_ROWS = 8  # for fewer, MKL is as fast

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, in_features)` to `(…, out_features)`."""
        if (
            x.device.type == "cpu"
            and x.numel() >= self.MIN_ROWS * self.in_features
            and x.dtype == self.weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and not torch.is_autocast_enabled("cpu")
        ):
            return OneDNNProduct.apply(x, self.weight)
        return super().forward(x)


class OneDNNProduct(torch.autograd.Function):
    """x Wᵀ in float32; both derivatives are such products themselves."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`(…, in)` and `(out, in)` to `(…, out)`."""
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = OneDNNProduct.apply(grad, weight.t())
        if ctx.needs_input_grad[1]:
            weight_grad = OneDNNProduct.apply(grad.flatten(0, -2).t(), x.flatten(0, -2).t())
        return x_grad, weight_grad
