"""The reference's way of working, restored by patches, to measure against in the same run."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

import dataset
import evaluation
import finetune
import prompting
import rope
from llama import Llama, select


def tokenize_at_every_use(self: dataset.LlamaDataset, all_data: list) -> dict:
    """`LlamaDataset.collate_fn`, but it encodes the sentences of each batch anew."""
    rows = [
        (sentence, label, self.tokenizer.encode(sentence, bos=True, eos=self.eos))
        for sentence, label, _ in all_data
    ]
    return COLLATE(self, rows)


COLLATE = dataset.LlamaDataset.collate_fn


def forward_everything(
    self: Llama, tokens: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """`Llama.hidden_states`, but all layers compute all positions, and logits come with it."""
    hidden = HIDDEN_STATES(self, tokens)
    self.output(hidden[:, [-1], :])
    return hidden if positions is None else select(hidden, positions)


HIDDEN_STATES = Llama.hidden_states


@contextlib.contextmanager
def reference_way() -> Iterator[None]:
    """Autograd on in evaluation, rotary tables rebuilt in every layer, tokenization at every use,
    and all states and logits computed where only the last state is read.
    """
    with (
        mock.patch.object(finetune, "model_eval", evaluation.model_eval.__wrapped__),
        mock.patch.object(prompting, "model_eval", evaluation.model_eval.__wrapped__),
        mock.patch.object(rope, "rotary_table", rope.rotary_table.__wrapped__),
        mock.patch.object(Llama, "hidden_states", forward_everything),
        mock.patch.object(dataset.LlamaDataset, "collate_fn", tokenize_at_every_use),
    ):
        yield
