"""How well a language model predicts the next tokens: per batch, added up, and as text."""

import math

import torch
import torch.nn.functional as F

from minllama.text.sequences import IGNORED
from minllama.training import distributed


class NextTokenScores:
    """How well the next tokens of a batch are predicted.

    The end of a document, where BOS comes next, is learned too, but is not counted.

    Args:
        logits: `(batch, seqlen, vocab_size)`.
        targets: ids `(batch, seqlen)`, `IGNORED` where there is none.
        n_targets: what the loss is divided by, where the batch is a share of another one; by
            default the number of its own targets.

    Attributes:
        loss: the mean cross-entropy, a scalar to go down.
        sums: of the counted targets their number, how many are the likeliest, and their
            cross-entropies in nats, `(3,)`.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        bos_id: int,
        n_targets: torch.Tensor | None = None,
    ):
        # A CPU finds the likeliest faster in float32 than in bfloat16.
        logits, targets = logits.flatten(0, 1).float(), targets.flatten()
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        is_target = targets != IGNORED
        self.loss = losses.sum() / (is_target.sum() if n_targets is None else n_targets)
        is_counted = is_target & (targets != bos_id)
        is_correct = is_counted & (logits.detach().argmax(dim=-1) == targets)
        nats = (losses.detach() * is_counted).sum()
        self.sums = torch.stack((is_counted.sum(), is_correct.sum(), nats))


class Tally:
    """Adds up scores, of all processes. They stay on their device until they are asked for."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []

    def add(self, scores: NextTokenScores) -> None:
        self._sums.append(scores.sums)

    def totals(self) -> list[float]:
        """The sums of `NextTokenScores.sums`."""
        mine = torch.stack(self._sums) if self._sums else torch.zeros(1, 3)
        return distributed.total(mine.cpu().double().sum(dim=0)).tolist()

    @property
    def n_targets(self) -> int:
        return int(self.totals()[0])

    def scores(self, tokens_per_byte: float) -> dict[str, float]:
        """Loss per token (nats), accuracy, perplexity, and bits per byte.

        Args:
            tokens_per_byte: of the whole text, without the BOS of its documents.

        Bits per byte do not depend on the tokenizer, unless it has unknown characters: a run of
        them is a single token, and what they were is not predicted.
        """
        n_targets, n_correct, nats = self.totals()
        loss = nats / n_targets
        return {
            "loss": loss,
            "accuracy": n_correct / n_targets,
            "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": loss / math.log(2) * tokens_per_byte,
        }


def describe(scores: dict[str, float]) -> str:
    return (
        f"loss {scores['loss']:.3f}, acc {scores['accuracy']:.3f}, "
        f"ppl {scores['perplexity']:.2f}, {scores['bits_per_byte']:.3f} bits per byte"
    )
