"""Sampling: choose the next token of each row from its logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minllama.common.errors import InputError

MIN_TEMPERATURE = 1e-30  # below it quotients of logits may overflow


@dataclass(frozen=True)
class Sampling:
    """Draw tokens from softmax(logits / temperature), with filters.

    Attributes:
        temperature: 0, or anything below `MIN_TEMPERATURE`, takes the most likely token.
        top_k: sample only from the k most likely tokens.
        top_p: sample only from the most likely tokens with this total probability, at least one
            (nucleus sampling, arXiv 1904.09751).
        repetition_penalty: lowers the logits of a row's own tokens: positive ones are divided by
            it, negative ones multiplied (arXiv 1909.05858, section 4.1). 1 changes nothing.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __call__(self, logits: torch.Tensor, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Draw one token for each row.

        Args:
            logits: `(batch, vocab_size)`.
            rows: the ids of each row so far.

        Returns:
            ids `(batch, 1)`.

        Raises:
            InputError: the logits of a row are not finite.
        """
        logits = logits.float()
        if self.repetition_penalty != 1:
            logits = penalize(logits, rows, self.repetition_penalty)
        if self.temperature < MIN_TEMPERATURE:
            highest, ids = logits.max(dim=-1, keepdim=True)
            check_scores(highest)
            return ids
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            highest, indices = logits.topk(self.top_k)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, indices, highest)
        probabilities = F.softmax(logits, dim=-1)
        check_scores(probabilities[:, :1])  # an infinite or NaN logit makes its whole row NaN
        if self.top_p is not None and self.top_p < 1:
            probabilities = nucleus(probabilities, self.top_p)
        return torch.multinomial(probabilities, num_samples=1)


def check_scores(scores: torch.Tensor, remedy: str = "take other weights") -> None:
    """Check that a model can choose by its scores.

    Args:
        scores: one for each row. The highest will do, since NaN and infinity are above all others.

    Raises:
        InputError: a score is not finite.
    """
    if not all(math.isfinite(score) for score in scores.flatten().tolist()):
        raise InputError(f"the model's scores are not finite; {remedy}")


def penalize(
    logits: torch.Tensor, rows: Sequence[Sequence[int]], repetition_penalty: float
) -> torch.Tensor:
    """Lower the logits `(batch, vocab_size)` of the tokens that each row contains."""
    logits = logits.clone()
    for row, ids in zip(logits, rows, strict=True):
        seen = torch.tensor(sorted(set(ids)), device=row.device)
        scores = row[seen]
        row[seen] = torch.where(
            scores > 0, scores / repetition_penalty, scores * repetition_penalty
        )
    return logits


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all probabilities `(batch, vocab_size)` but the highest that add up to `top_p`."""
    highest, order = probabilities.sort(dim=-1, descending=True)
    total_before = highest.cumsum(dim=-1) - highest
    is_dropped = total_before >= top_p
    is_dropped[:, 0] = False
    return torch.zeros_like(probabilities).scatter(-1, order, highest.masked_fill(is_dropped, 0.0))
