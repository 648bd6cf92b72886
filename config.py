"""The shape of a Llama: the numbers that a checkpoint carries as `model_args`."""

import math
from typing import Any


class LlamaConfig:
    """Hyperparameters of a Llama 2. The defaults are those of `stories42M.pt`.

    Args:
        vocab_size: number of token ids.
        dim: width of the residual stream.
        dropout: probability of dropping an element of the embeddings, the attention weights and
            each sub-layer's output while training.
        attention_dropout: another probability for the attention weights; None means `dropout`.
        n_layers: number of transformer layers.
        n_heads: number of query heads; `dim` is split evenly among them.
        n_kv_heads: number of key and value heads (grouped-query attention, arXiv 2305.13245);
            None means as many as query heads.
        max_seq_len: longest context, in tokens.
        layer_norm_eps: epsilon of the RMSNorms.
        multiple_of: the feed-forward width is rounded up to a multiple of this.
        hidden_dim: width of the feed-forward layer; None derives it from `dim`.
        causal: whether a position attends only to itself and those before it. The assignment
            attends without a mask, so the default is False.
        **kwargs: further keywords are kept as attributes.
    """

    def __init__(
        self,
        vocab_size: int = 32000,
        dim: int = 512,
        dropout: float = 0.0,
        n_layers: int = 8,
        n_heads: int = 8,
        n_kv_heads: int | None = 8,
        max_seq_len: int = 1024,
        layer_norm_eps: float = 1e-5,
        multiple_of: int = 32,
        hidden_dim: int | None = None,
        *,
        causal: bool = False,
        attention_dropout: float | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.dim = dim
        self.dropout = dropout
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.max_seq_len = max_seq_len
        self.layer_norm_eps = layer_norm_eps
        self.multiple_of = multiple_of
        self.hidden_dim = hidden_dim
        self.causal = causal
        self.attention_dropout = dropout if attention_dropout is None else attention_dropout
        for name, value in kwargs.items():
            setattr(self, name, value)

    def check(self) -> None:
        """
        Raises:
            ValueError: there is no Llama of this configuration; the message says why.
        """
        counts = ["vocab_size", "dim", "n_layers", "n_heads", "max_seq_len", "multiple_of"]
        counts += [name for name in ("n_kv_heads", "hidden_dim") if getattr(self, name) is not None]
        for name in counts:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive integer")
        for name, high in (("dropout", 1), ("attention_dropout", 1), ("layer_norm_eps", math.inf)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < high:
                below = "" if high == math.inf else f", below {high}"
                raise ValueError(f"{name} is {value!r}, expected a number of at least 0{below}")
        if type(self.causal) is not bool:
            raise ValueError(f"causal is {self.causal!r}, expected True or False")
        n_kv_heads = self.n_kv_heads or self.n_heads
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is no multiple of n_heads {self.n_heads}")
        if self.n_heads % n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is no multiple of n_kv_heads {n_kv_heads}")
        if self.dim // self.n_heads % 2:
            raise ValueError(f"dim / n_heads is {self.dim // self.n_heads}, expected an even one")

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"LlamaConfig({settings})"
