"""The key/value cache of causal decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llama import Llama
    from minllama.kernels.batch1 import Batch1Llama


class KVCache:
    """The keys and values of each sequence's tokens so far, for all layers.

    The tokens of a sequence stand at positions 0, 1, … on the left, however long the other
    sequences are. Whatever follows them is never attended to, and the next tokens overwrite it.

    Args:
        llama: the causal model; its norms say which device and precision the cache has.
        max_len: number of positions to make room for.

    Attributes:
        lengths: number of tokens of each sequence. Setting one lower forgets its last tokens.
        data: keys and values of all layers, `(n_layers, 2, batch, n_kv_heads, max_len, head_dim)`.
        layers: keys and values of each layer, `(2, batch, n_kv_heads, max_len, head_dim)`; views of
            `data`, or copies where autograd needs them.
        start: during a forward pass, the position of its first token: one number if all sequences
            agree, otherwise `(batch,)`.
        stop: during a forward pass, the number of positions that it reaches to.
        positions: if sequences differ, the positions of the pass's tokens, `(batch, n)`.
        mask: if sequences differ, which keys these tokens see, `(batch, 1, n, stop)`.

    Raises:
        ValueError: the model is not causal, so that a new token changes all keys and values.
    """

    def __init__(self, llama: Llama | Batch1Llama, batch_size: int, max_len: int):
        config, weight = llama.config, llama.norm.weight
        if not config.causal:
            raise ValueError("without a causal mask, nothing can be cached")
        n_kv_heads = config.n_kv_heads or config.n_heads
        shape = (config.n_layers, 2, batch_size, n_kv_heads, max_len, config.dim // config.n_heads)
        self.data = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        self.layers = list(self.data)
        self.lengths = [0] * batch_size
        self.start: int | torch.Tensor = 0
        self.stop = 0
        self.positions: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None

    def begin(self, n: int) -> None:
        """Prepare for a forward pass over the next n tokens of each sequence."""
        self.stop = max(self.lengths) + n
        if min(self.lengths) == max(self.lengths):
            self.start, self.mask = self.lengths[0], None
        else:
            device = self.data.device
            self.start = torch.tensor(self.lengths, device=device)
            self.positions = self.start[:, None] + torch.arange(n, device=device)
            seen = self.positions[:, :, None] >= torch.arange(self.stop, device=device)
            self.mask = seen[:, None]

    def update(
        self, layer_id: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's keys and values of the pass's tokens.

        Args:
            key, value: `(batch, n_kv_heads, n, head_dim)`.

        Returns:
            keys and values of all tokens so far, `(batch, n_kv_heads, stop, head_dim)`.
        """
        if torch.is_grad_enabled():  # the backward pass needs the former ones as they are
            self.layers[layer_id] = self.layers[layer_id].clone()
        keys, values = self.layers[layer_id][0], self.layers[layer_id][1]
        if self.mask is None:
            keys[:, :, self.start : self.stop] = key
            values[:, :, self.start : self.stop] = value
        else:
            rows = torch.arange(len(key), device=key.device)[:, None]
            keys[rows, :, self.positions] = key.transpose(1, 2).type_as(keys)
            values[rows, :, self.positions] = value.transpose(1, 2).type_as(values)
        return keys[:, :, : self.stop], values[:, :, : self.stop]

    def end(self, n: int) -> None:
        """Count the n tokens of a forward pass."""
        self.lengths = [length + n for length in self.lengths]

    def keep(self, rows: list[int]) -> None:
        """Forget all sequences except these."""
        self.lengths = [self.lengths[row] for row in rows]
        self.data = self.data[:, :, rows]
        self.layers = list(self.data)
