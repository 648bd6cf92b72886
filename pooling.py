"""`--pooling`: which of a sentence's hidden states the new head sees."""

import argparse

import torch

from utils import adder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser.add_argument_group("pooling"))
    help = "what of a sentence the new head sees: its last token's state, or the mean of all; by "
    help += "default the last column's, as the assignment has it, or with --causal the last token's"
    add("--pooling", choices=("last", "mean"), help=help)


def mean_state(hidden: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """The mean of the states of each row's tokens, without padding (arXiv 1908.10084, section 3).

    Args:
        hidden: `(batch, seqlen, dim)`.
        lengths: of the rows `(batch,)`; None takes every column for a token.

    Returns:
        `(batch, dim)`.
    """
    if lengths is None:
        return hidden.mean(dim=1)
    real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    return (hidden * real[..., None]).sum(dim=1) / lengths[:, None]
