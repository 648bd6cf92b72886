"""The saved state of AdamW: checks, and putting it back."""

import math
from typing import Any

from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def check_step(step: Any) -> None:
    """Check a parameter's number of optimizer steps."""
    if type(step) is not int or step < 0:
        raise ValueError(f"step {step}")


def set_groups(optimizer: Optimizer, groups: list[dict]) -> None:
    """Restore the learning rates of parameter groups; every other setting has to be the same."""
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, saved_value in saved.items():
            if key == "params":
                continue
            value = type(group[key])(saved_value)
            is_valid = 0 <= value < math.inf if key == "lr" else value == group[key]
            if not is_valid:
                raise ValueError(f"{key} {value}")
            group[key] = value
