"""The key/value cache of causal decoding."""

import torch

from config import LlamaConfig


class KVCache:
    """The keys and values of each row's tokens so far, for all layers.

    A row's tokens stand at positions 0, 1, … on the left, however long the other rows are. What
    lies behind a row's length is never attended to, and its next tokens overwrite it.

    Args:
        max_len: number of positions to make room for.
        data, lengths: of another cache of this shape, to work on; None is an empty one.

    Attributes:
        lengths: number of tokens of each row. Setting one lower forgets the row's last tokens.
        data: keys and values of all layers, `(n_layers, 2, batch, n_kv_heads, max_len, head_dim)`.
        keys, values: of each layer, `(batch, n_kv_heads, max_len, head_dim)`; views of `data`, or
            where autograd follows copies.
        start: while a forward pass runs, the position of its first token, one number if all rows
            agree and otherwise `(batch,)`.
        stop: then also the number of positions that it reaches to.
        positions, mask: where rows differ, the positions of its tokens `(batch, n)` and which keys
            they see `(batch, 1, n, stop)`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch_size: int,
        max_len: int,
        device: torch.device | str = "cpu",
        data: torch.Tensor | None = None,
        lengths: list[int] | torch.Tensor | None = None,
    ):
        n_kv_heads = config.n_kv_heads or config.n_heads
        shape = (batch_size, n_kv_heads, max_len, config.dim // config.n_heads)
        self.lengths = [0] * batch_size if lengths is None else lengths
        if data is None:
            data = torch.zeros(config.n_layers, 2, *shape, device=device)
        self.data = data
        self._view()
        self.start: int | torch.Tensor = 0
        self.stop = 0
        self.positions: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None

    def begin(self, n: int) -> None:
        """Prepare for a forward pass over each row's next n tokens."""
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
            those of all tokens so far, `(batch, n_kv_heads, stop, head_dim)`.
        """
        if torch.is_grad_enabled():  # autograd needs those that it has seen
            self.keys[layer_id] = self.keys[layer_id].clone()
            self.values[layer_id] = self.values[layer_id].clone()
        keys, values = self.keys[layer_id], self.values[layer_id]
        if self.mask is None:
            keys[:, :, self.start : self.stop] = key
            values[:, :, self.start : self.stop] = value
        else:
            rows = torch.arange(len(key), device=key.device)[:, None]
            keys[rows, :, self.positions] = key.transpose(1, 2).type_as(keys)
            values[rows, :, self.positions] = value.transpose(1, 2).type_as(values)
        return keys[:, :, : self.stop], values[:, :, : self.stop]

    def end(self, n: int) -> None:
        """Count the n tokens of the pass in."""
        self.lengths = [length + n for length in self.lengths]

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these."""
        self.lengths = [self.lengths[row] for row in rows]
        self.data = self.data[:, :, rows]
        self._view()

    def _view(self) -> None:
        self.keys = [layer[0] for layer in self.data]
        self.values = [layer[1] for layer in self.data]
