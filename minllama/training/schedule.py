"""Learning-rate schedules, and the flags of pre-training's."""

import math
from dataclasses import dataclass

from minllama.common.settings import Settings, flag

MAX_WARMUP = 100  # steps, if --warmup_steps is not given


def learning_rate(
    step: int,
    n_steps: int,
    n_warmup: int,
    peak: float,
    final: float = 0.0,
    schedule: str = "cosine",
) -> float:
    """The learning rate of a step: a linear warm-up to the peak, then a decay, or none.

    Args:
        step: the number of steps taken before.
        schedule: "constant", "linear" or "cosine" (arXiv 1608.03983, equation 5).
    """
    if step < n_warmup:
        return peak * (step + 1) / (n_warmup + 1)
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    fraction = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[schedule]
    return final + (peak - final) * fraction


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings(Settings):
    """The flags of pre-training's optimizer and learning-rate schedule."""

    lr: float = flag(1e-3, "peak learning rate")
    steps: int = flag(1000, "optimizer steps", low=1)
    warmup_steps: int | None = flag(
        None, "linear warm-up steps (default: a tenth of --steps, at most 100)"
    )
    min_lr: float = flag(0.0, "final rate of the cosine decay; equal to --lr for none")
    weight_decay: float = flag(0.1, "weight decay of the matrices")
    grad_clip: float = flag(1.0, "maximum gradient norm; 0 turns clipping off")

    @property
    def n_warmup(self) -> int:
        """Steps of the warm-up."""
        if self.warmup_steps is None:
            return min(MAX_WARMUP, self.steps // 10)
        return self.warmup_steps

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to `lr`, then cosine decay to `min_lr`; `step` steps were taken before."""
        return learning_rate(step, self.steps, self.n_warmup, self.lr, self.min_lr)
