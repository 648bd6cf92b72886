"""The shape of a Llama: the numbers that a checkpoint carries as `model_args`."""

from typing import Any


class LlamaConfig:
    """Hyperparameters of a Llama 2. The defaults are those of `stories42M.pt`.

    Args:
        vocab_size: number of token ids.
        dim: width of the residual stream.
        dropout: probability of dropping an element of the embeddings, the attention weights and
            each sub-layer's output while training.
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
        for name, value in kwargs.items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"LlamaConfig({settings})"
