"""The reference's way of working, restored by patches, to measure against in the same run."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

import evaluation
import rope
from dataset import EncodedDataset, LlamaDataset
from llama import Llama, select

hidden_states = Llama.hidden_states
model_eval = evaluation.model_eval


def tokenize_at_every_use(self: LlamaDataset, row: tuple) -> list[int]:
    """`LlamaDataset.token_ids`, but it encodes the sentence anew."""
    return self.tokenizer.encode(row[0], bos=True, eos=self.eos)


def all_hidden_states(
    self: Llama, tokens: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """`Llama.hidden_states`, but all layers compute all positions."""
    hidden = hidden_states(self, tokens)
    return hidden if positions is None else select(hidden, positions)


@contextlib.contextmanager
def reference_way() -> Iterator[None]:
    """Rotary tables rebuilt in every layer, tokenization at every use, and all states computed
    where only the last one is read.
    """
    with (
        mock.patch.object(rope, "rotary_table", rope.rotary_table.__wrapped__),
        mock.patch.object(EncodedDataset, "token_ids", tokenize_at_every_use),
        mock.patch.object(Llama, "hidden_states", all_hidden_states),
    ):
        yield


def model_eval_with_autograd(*args) -> tuple:
    """`evaluation.model_eval` as the reference calls it while it fine-tunes."""
    return model_eval.__wrapped__(*args)
