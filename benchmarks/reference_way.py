"""The reference's way of working, restored by patches, to measure against in the same run."""

import contextlib
import ctypes
import math
from collections.abc import Iterator
from unittest import mock

import torch
from torch import nn

import evaluation
import rope
import utils
from dataset import EncodedDataset, LlamaDataset
from linear import Linear
from llama import Llama, select
from optimizer import AdamW

M_MMAP_THRESHOLD = -3  # of malloc.h
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


@contextlib.contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """The opposite of `utils.keep_freed_memory`: as glibc has set itself soon after a start."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(utils.M_MMAP_MAX, 65536)
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(utils.M_TRIM_THRESHOLD, 64 << 20)
    try:
        yield
    finally:
        utils.keep_freed_memory()


@contextlib.contextmanager
def reference_way() -> Iterator[None]:
    """Rotary tables rebuilt in every layer, tokenization at every use, all states computed where
    only the last one is read, PyTorch's own float32 products, a Python loop over the parameters in
    the optimizer, memory given back to the system.
    """
    with (
        freed_memory_given_back(),
        mock.patch.object(rope, "rotary_table", rope.rotary_table.__wrapped__),
        mock.patch.object(EncodedDataset, "token_ids", tokenize_at_every_use),
        mock.patch.object(Llama, "hidden_states", all_hidden_states),
        mock.patch.object(Linear, "forward", nn.Linear.forward),
        mock.patch.object(AdamW, "_update", update_one_by_one),
    ):
        yield


def model_eval_with_autograd(*args) -> tuple:
    """`evaluation.model_eval` as the reference calls it while it fine-tunes."""
    return model_eval.__wrapped__(*args)
