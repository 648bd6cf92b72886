"""How well a language model predicts the next token: loss, accuracy, perplexity, bits per byte."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from minllama.common.errors import InputError
from minllama.common.progress import progress_bar
from minllama.text.sequences import IGNORED, EvaluationSequences
from minllama.training import distributed
from minllama.training.precision import mixed_precision
from utils import to_device


def next_token_loss(
    logits: torch.Tensor, targets: torch.Tensor, bos_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the cross-entropy of the next tokens, and count the tokens that are predicted.

    Where BOS comes next a document ends. This is trained, but not counted.

    Args:
        logits: `(batch, seqlen, vocab_size)`.
        targets: ids `(batch, seqlen)`, `IGNORED` where nothing comes next.

    Returns:
        the cross-entropy of all targets in nats, a scalar to backpropagate; and, detached, of the
        counted targets their number, the number predicted correctly, and the nats, `(3,)`.
    """
    # A CPU finds the largest logit faster in float32 than in bfloat16.
    logits, targets = logits.flatten(0, 1).float(), targets.flatten()  # (batch · seqlen, …)
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    is_counted = (targets != IGNORED) & (targets != bos_id)
    is_correct = is_counted & (logits.detach().argmax(dim=-1) == targets)
    nats = (losses.detach() * is_counted).sum()
    return losses.sum(), torch.stack((is_counted.sum(), is_correct.sum(), nats))


def total_counts(counts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add the counts of `next_token_loss` over batches and processes, in float64 on the CPU."""
    total = torch.zeros(3, dtype=torch.float64)
    if counts:
        total += torch.stack(list(counts)).cpu().double().sum(dim=0)
    return distributed.sum_over_ranks(total)


def scores_of(counts: torch.Tensor, tokens_per_byte: float) -> dict[str, float]:
    """Loss per token in nats, accuracy, perplexity and bits per byte.

    Bits per byte can be compared between tokenizers, unless one has unknown characters: it reads a
    run of them as one token, and need not predict which they were.

    Args:
        counts: the sums that `total_counts` returns.
        tokens_per_byte: tokens in the whole text, except BOS, over its bytes.
    """
    n_targets, n_correct, nats = counts.tolist()
    loss = nats / n_targets
    return {
        "loss": loss,
        "accuracy": n_correct / n_targets,
        "perplexity": math.exp(min(loss, 700)),  # exp(710) overflows
        "bits_per_byte": loss / math.log(2) * tokens_per_byte,
    }


def format_scores(scores: dict[str, float]) -> str:
    """Write scores as a log line has them."""
    return (
        f"loss {scores['loss']:.3f}, acc {scores['accuracy']:.3f}, "
        f"ppl {scores['perplexity']:.2f}, {scores['bits_per_byte']:.3f} bits per byte"
    )


@torch.inference_mode()
def evaluate(
    llama: nn.Module, sequences: EvaluationSequences, batch_size: int, dtype: str
) -> dict[str, float]:
    """Score a language model on sequences; several processes share the batches.

    Args:
        dtype: precision of matrix products, "float32" or "bfloat16".

    Raises:
        InputError: the loss is not finite.
    """
    llama.eval()
    device = next(llama.parameters()).device
    loader = DataLoader(sequences, batch_size, generator=torch.Generator())
    counts = []
    for _, (tokens, targets), is_counted in distributed.rounds(
        progress_bar(loader, desc="evaluate")
    ):
        tokens, targets = to_device(tokens, device), to_device(targets, device)
        with mixed_precision(device, dtype):
            logits, _ = llama(tokens, targets)  # (batch, seqlen, vocab_size)
        _, batch_counts = next_token_loss(logits, targets, sequences.text.tokenizer.bos_id)
        if is_counted:
            counts.append(batch_counts)
    scores = scores_of(total_counts(counts), sequences.text.tokens_per_byte)
    if not math.isfinite(scores["loss"]):
        raise InputError(
            f"the evaluation loss is {scores['loss']}; lower --lr, or take other weights"
        )
    return scores
