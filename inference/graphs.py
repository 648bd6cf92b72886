"""The step of decoding on a GPU, compiled for a cache of fixed size and replayed as CUDA graphs.

A step of a small model launches some hundred kernels, which takes longer than they do. Compiled it
is recorded as a graph, which is launched as one. For that nothing in a step may depend on how many
tokens there are: the cache is read as a whole, behind a mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from config import LlamaConfig
from inference.cache import KVCache
from inference.packing import PackedLlama, pack
from rope import rotary_table

if TYPE_CHECKING:
    from llama import Llama


class StaticCache(KVCache):
    """A cache in which lengths are a tensor, and which is always read as a whole.

    Args:
        data: that of a `KVCache`.
        lengths: number of tokens of each row, `(batch,)`.
    """

    def __init__(self, config: LlamaConfig, data: torch.Tensor, lengths: torch.Tensor):
        batch_size, max_len = data.shape[2], data.shape[4]
        super().__init__(config, batch_size, max_len, data=data, lengths=lengths)
        self.start, self.stop = lengths, max_len

    def begin(self, n: int) -> None:
        device = self.data.device
        self.positions = self.start[:, None] + torch.arange(n, device=device)
        seen = self.positions[:, :, None] >= torch.arange(self.stop, device=device)
        self.mask = seen[:, None]

    def end(self, n: int) -> None:
        """Nothing: who calls the step counts."""


class GraphLlama(PackedLlama):
    """A causal model, packed, whose steps are compiled, for as many rows as there are.

    Prompts go through the model as it is.

    Args:
        llama: is packed in place.
        dtype: of the weights, as for `pack`.
        options: of `torch.compile`.
    """

    def __init__(self, llama: Llama, dtype: str, **options: Any):
        super().__init__(pack(llama, dtype))
        torch.compiler.assume_constant_result(rotary_table)  # no part of the step
        options = options or {"mode": "reduce-overhead"}
        self.compiled = torch.compile(self._step, fullgraph=True, **options)

    def next_logits(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """As `Llama.next_logits`."""
        if tokens.shape[1] > 1:
            return super().next_logits(tokens, cache)
        torch._dynamo.mark_static_address(cache.data)  # the step writes to it
        lengths = torch.tensor(cache.lengths, device=cache.data.device)
        logits = self.compiled(tokens, lengths, cache.data)
        cache.end(1)
        return logits.clone()  # the next replay writes over them

    def _step(
        self, tokens: torch.Tensor, lengths: torch.Tensor, data: torch.Tensor
    ) -> torch.Tensor:
        return self.llama.next_logits(tokens, StaticCache(self.config, data, lengths))
