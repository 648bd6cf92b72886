"""AdamW, by hand."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.optim import Optimizer

BLOCK = 1 << 18  # elements


class AdamW(Optimizer):
    """Adam (arXiv 1412.6980) with decoupled weight decay (arXiv 1711.05101).

    For the gradient g at step t:

        m = β1·m + (1 - β1)·g
        v = β2·v + (1 - β2)·g²
        p = p - α·m / (√v + ε),   α = lr·√(1 - β2^t) / (1 - β1^t)
        p = p - lr·weight_decay·p

    This is the efficient form of the bias correction (end of section 2 of Kingma & Ba), so ε is
    not rescaled by the correction, unlike in Algorithm 1. Decay acts on the updated parameter.

    The parameters of a group are updated by PyTorch's multi-tensor operations, on a CPU in blocks
    that fit its cache. Rows of an embedding that a batch does not touch are updated too: their
    moments decay and move them, and to do that only when they are next seen would not be AdamW.

    Args:
        params: parameters, or groups of them as dicts with settings of their own.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        correct_bias: False leaves the correction out (α = lr), as BERT's original code does.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ):
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr} - should be >= 0.0")
        if not 0.0 <= betas[0] < 1.0:
            raise ValueError(f"Invalid beta parameter: {betas[0]} - should be in [0.0, 1.0)")
        if not 0.0 <= betas[1] < 1.0:
            raise ValueError(f"Invalid beta parameter: {betas[1]} - should be in [0.0, 1.0)")
        if not eps >= 0.0:
            raise ValueError(f"Invalid epsilon value: {eps} - should be >= 0.0")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight decay: {weight_decay} - should be >= 0.0")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            what `closure` returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads = [p.grad for p in params]
        if any(grad.is_sparse for grad in grads):
            raise RuntimeError("AdamW does not support sparse gradients")
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] += 1
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        step_sizes = [group["lr"]] * len(params)
        if group["correct_bias"]:
            step_sizes = [
                group["lr"] * math.sqrt(1 - beta2 ** s["step"]) / (1 - beta1 ** s["step"])
                for s in states
            ]
        moments = [(s["exp_avg"], s["exp_avg_sq"]) for s in states]
        rows = zip(params, grads, *zip(*moments, strict=True), strict=True)
        rows = (tuple(map(local_part, row)) for row in rows)
        for block, sizes in blocks(rows, step_sizes):
            p, grad, exp_avg, exp_avg_sq = block
            torch._foreach_mul_(exp_avg, beta1)
            torch._foreach_add_(exp_avg, grad, alpha=1 - beta1)
            torch._foreach_mul_(exp_avg_sq, beta2)
            torch._foreach_addcmul_(exp_avg_sq, grad, grad, value=1 - beta2)
            denominators = torch._foreach_sqrt(exp_avg_sq)
            torch._foreach_add_(denominators, group["eps"])
            torch._foreach_addcdiv_(p, exp_avg, denominators, [-size for size in sizes])
            if group["weight_decay"] > 0:
                # Not a product with 1 - lr·weight_decay: float32 would round that coarsely.
                torch._foreach_add_(p, p, alpha=-group["lr"] * group["weight_decay"])


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that is spread over several, else the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def blocks(
    rows: Iterable[tuple[torch.Tensor, ...]], step_sizes: Iterable[float]
) -> Iterator[tuple[list[list[torch.Tensor]], list[float]]]:
    """Cut tensors into pieces, and put pieces together, to about `BLOCK` elements at a time.

    On a CPU these stay in its cache while all operations pass over them; a GPU gets all at once.

    Args:
        rows: a parameter, its gradient and its moments, of one shape.
        step_sizes: one for each row.

    Yields:
        the pieces of the parameters, of the gradients and of each of the moments; their step sizes.
    """
    pieces, sizes, n_elements = [], [], 0
    for row, step_size in zip(rows, step_sizes, strict=True):
        whole = row[0].device.type != "cpu" or not all(t.is_contiguous() for t in row)
        cut = [row] if whole else zip(*(t.view(-1).split(BLOCK) for t in row), strict=True)
        for piece in cut:
            if n_elements + piece[0].numel() > BLOCK and pieces and not whole:
                yield [list(column) for column in zip(*pieces, strict=True)], sizes
                pieces, sizes, n_elements = [], [], 0
            pieces.append(piece)
            sizes.append(step_size)
            n_elements += piece[0].numel()
    if pieces:
        yield [list(column) for column in zip(*pieces, strict=True)], sizes
