"""How the next token of each row is chosen from its logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

COLDEST = 1e-30  # below it, quotients of logits may overflow


@dataclass(frozen=True)
class Sampling:
    """Draws tokens from softmax(logits / temperature), of which some may be left out.

    Attributes:
        temperature: 0 takes the likeliest token, and so does less than `COLDEST`.
        top_k: draw from so many of the likeliest tokens only.
        top_p: draw from the likeliest tokens only that together have this probability, at least
            one (nucleus sampling, arXiv 1904.09751).
        repetition_penalty: lowers the logits of tokens that a row has: those above 0 are divided
            by it, the others multiplied (arXiv 1909.05858, section 4.1). 1 changes nothing.
        generator: draws the random numbers; None is PyTorch's own.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    generator: torch.Generator | None = None

    def __call__(self, logits: torch.Tensor, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """
        Args:
            logits: `(batch, vocab_size)`.
            rows: the ids of each row so far.

        Returns:
            ids `(batch, 1)`.
        """
        logits = logits.float()
        if self.repetition_penalty != 1:
            logits = penalized(logits, rows, self.repetition_penalty)
        if self.temperature < COLDEST:
            return logits.argmax(dim=-1, keepdim=True)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            highest, indices = logits.topk(self.top_k)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, indices, highest)
        probabilities = F.softmax(logits, dim=-1)
        if self.top_p is not None and self.top_p < 1:
            probabilities = nucleus(probabilities, self.top_p)
        return torch.multinomial(probabilities, num_samples=1, generator=self.generator)


def penalized(
    logits: torch.Tensor, rows: Sequence[Sequence[int]], repetition_penalty: float
) -> torch.Tensor:
    """The logits `(batch, vocab_size)` with lower ones for the tokens that each row has."""
    logits = logits.clone()
    for row, ids in zip(logits, rows, strict=True):
        seen = torch.tensor(sorted(set(ids)), device=row.device)
        chosen = row[seen]
        row[seen] = torch.where(
            chosen > 0, chosen / repetition_penalty, chosen * repetition_penalty
        )
    return logits


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The probabilities `(batch, vocab_size)` with 0 for all but the likeliest that reach top_p."""
    highest, order = probabilities.sort(dim=-1, descending=True)
    before = highest.cumsum(dim=-1) - highest  # of those that are likelier
    left_out = before >= top_p
    left_out[:, 0] = False
    return torch.zeros_like(probabilities).scatter(-1, order, highest.masked_fill(left_out, 0.0))
