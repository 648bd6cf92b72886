"""The reference's way of working, to measure against in the same run.

`reference_way` restores most of it by patches, `make_reference_loader` makes its batches. The
model is the plain one: nothing is put in from outside to make it faster.
"""

import contextlib
import ctypes
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.utils.data import DataLoader

import rope
from llama import Llama
from minllama.evaluation.classification import model_eval
from minllama.inference.cache import KVCache
from minllama.kernels.cpu import M_MMAP_MAX, M_TRIM_THRESHOLD, keep_freed_memory
from minllama.text.batches import Batch, Example, collate
from optimizer import AdamW
from tokenizer import Tokenizer

M_MMAP_THRESHOLD = -3  # of malloc.h
hidden_states = Llama.hidden_states


@contextlib.contextmanager
def reference_way() -> Iterator[None]:
    """Work as the reference does, but for the batches.

    Rotary tables are rebuilt in every layer. All states are computed where only the last one is
    read. The optimizer is a Python loop over the parameters. Memory is given back to the system.
    Products and attention are PyTorch's own anyway, as long as the model is not accelerated.
    """
    with (
        freed_memory_given_back(),
        mock.patch.object(rope, "rotary_table", rope.rotary_table.__wrapped__),
        mock.patch.object(Llama, "hidden_states", all_hidden_states),
        mock.patch.object(AdamW, "_update", update_one_by_one),
    ):
        yield


@contextlib.contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """The opposite of `keep_freed_memory`: as glibc has set itself soon after a start."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_MAX, 65536)
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, 64 << 20)
    try:
        yield
    finally:
        keep_freed_memory()


def all_hidden_states(
    self: Llama,
    tokens: torch.Tensor,
    positions: torch.Tensor | None = None,
    cache: KVCache | None = None,
) -> torch.Tensor:
    """`Llama.hidden_states`, but all layers compute all positions."""
    hidden = hidden_states(self, tokens, cache=cache)
    return hidden if positions is None else hidden.take_along_dim(positions[..., None], dim=1)


def update_one_by_one(self: AdamW, group: dict) -> None:
    """`AdamW._update`, but in a Python loop over the parameters."""
    beta1, beta2 = group["betas"]
    for p in group["params"]:
        if p.grad is None:
            continue
        state = self.state[p]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["step"] += 1
        state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        step_size = group["lr"]
        if group["correct_bias"]:
            correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
            step_size *= correction
        p.addcdiv_(
            state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-step_size
        )
        if group["weight_decay"] > 0:
            p.add_(p, alpha=-group["lr"] * group["weight_decay"])


def model_eval_with_autograd(*args: Any) -> tuple:
    """`model_eval` as the reference calls it while it fine-tunes: autograd records."""
    return model_eval.__wrapped__(*args)


def make_reference_loader(
    data: Sequence[Example], batch_size: int, tokenizer: Tokenizer, *, shuffle: bool = False
) -> DataLoader:
    """The batches of `make_loader`, whose sentences are tokenized at every use.

    Args:
        data: rows with the very ids that a model is to read.
    """
    collate_fn = functools.partial(tokenize_and_pad, tokenizer=tokenizer)
    return DataLoader(data, shuffle=shuffle, batch_size=batch_size, collate_fn=collate_fn)


def tokenize_and_pad(rows: Sequence[Example], tokenizer: Tokenizer) -> Batch:
    """Tokenize the sentences and make a batch, as `collate` does.

    The batch has the rows' own ids. They are the same, unless they were cut to the context or made
    longer for a measurement.
    """
    for sentence, _, _ in rows:
        tokenizer.encode(sentence, bos=True, eos=False)
    return collate(rows, tokenizer.pad_id)
