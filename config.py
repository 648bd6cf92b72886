"""The shape of a Llama: the numbers that a checkpoint carries as `model_args`."""

import inspect
import math
from typing import Any

MAX_COUNTS = {
    "vocab_size": 2**31 - 1,
    "dim": 2**31 - 1,
    "n_heads": 2**31 - 1,
    "n_kv_heads": 2**31 - 1,
    "hidden_dim": 2**31 - 1,
    "multiple_of": 2**31 - 1,
    "max_seq_len": 2**20,  # tokens; the rotary table has a row for each
    "n_layers": 10_000,
}
RANGES = {  # from, and to below
    "dropout": (0, 1),
    "attention_dropout": (0, 1),
    "layer_norm_eps": (0, 1e30),  # used in float32, as theta
    "rope_theta": (1, 1e30),
    "ffn_dim_multiplier": (1e-9, 2**31),
}
OPTIONAL = ("n_kv_heads", "hidden_dim", "ffn_dim_multiplier")


# Settings of the assignment that change nothing here: a Llama computes the same with any values.
UNUSED = {
    "return_dict": True, "use_cache": True, "output_hidden_states": False,
    "output_attentions": False, "output_scores": False, "torchscript": False, "is_decoder": False,
    "return_dict_in_generate": False, "do_sample": False, "early_stopping": False,
    "max_length": 20, "min_length": 0, "top_k": 50, "top_p": 1.0, "temperature": 1.0,
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "repetition_penalty": 1.0,
    "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "diversity_penalty": 0.0, "chunk_size_feed_forward": 0, "num_labels": 2,
    "bad_words_ids": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "architectures": None, "finetuning_task": None, "id2label": None, "label2id": None,
    "tokenizer_class": None, "prefix": None, "pad_token_id": None, "sep_token_id": None,
    "decoder_start_token_id": None, "task_specific_params": None, "xla_device": None,
    "_name_or_path": "",
}  # fmt: skip
# Settings of the assignment that have to be as they are: with other values it is another model.
FIXED = {
    "position_embedding_type": "rotary", "pruned_heads": {}, "tie_word_embeddings": True,
    "use_bfloat16": False, "add_cross_attention": False, "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
}  # fmt: skip


def feed_forward_dim(dim: int, multiple_of: int, multiplier: float | None = None) -> int:
    """The width of a feed-forward layer: 2/3 · 4 · dim · multiplier, rounded up to a multiple."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return math.ceil(width / multiple_of) * multiple_of


class PretrainedConfig:
    """The settings that the assignment has besides `LlamaConfig`'s, none of which is used here."""

    model_type = ""

    def __init__(self, **kwargs: Any):
        for name, value in (UNUSED | FIXED | kwargs).items():
            setattr(self, name, value)


class LlamaConfig(PretrainedConfig):
    """Hyperparameters of a Llama 2. The defaults are those of `stories42M.pt`.

    Args:
        vocab_size: number of token ids.
        dim: width of the residual stream.
        dropout: probability that an element of the embeddings, the attention weights or a
            sub-layer's output is dropped in training.
        attention_dropout: this probability for the attention weights; None means `dropout`.
        n_layers: number of transformer layers.
        n_heads: number of query heads; `dim` is split evenly among them.
        n_kv_heads: number of key and value heads (grouped-query attention, arXiv 2305.13245);
            None means as many as query heads.
        max_seq_len: longest context, in tokens.
        layer_norm_eps: epsilon of the RMSNorms.
        multiple_of: the feed-forward width is rounded up to a multiple of this.
        hidden_dim: the feed-forward width; None derives it from `dim`, see `feed_forward_dim`.
        ffn_dim_multiplier: factor of the derived feed-forward width.
        tie_embeddings: whether the embedding and the output head are one matrix.
        rope_theta: base of the wavelengths of the rotary position embedding.
        causal: whether a position attends only to itself and earlier ones. The assignment attends
            without a mask, so the default is False.
        bos_token_id, eos_token_id: ids that begin and end a text; generation stops at both.
        tokenizer: the `fingerprint` of the tokenizer that the weights were trained with, if known.
        **kwargs: kept as attributes.
    """

    model_type = "llama"

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
        rope_theta: float = 10000.0,
        ffn_dim_multiplier: float | None = None,
        tie_embeddings: bool = True,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        tokenizer: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.dim = dim
        self.dropout = dropout
        self.n_layers = n_layers
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.max_seq_len = max_seq_len
        self.layer_norm_eps = layer_norm_eps
        self.multiple_of = multiple_of
        self.hidden_dim = hidden_dim
        self.rope_theta = rope_theta
        self.ffn_dim_multiplier = ffn_dim_multiplier
        self.tie_embeddings = tie_embeddings
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.tokenizer = tokenizer
        self.causal = causal
        self.attention_dropout = dropout if attention_dropout is None else attention_dropout

    @property
    def ffn_dim(self) -> int:
        """The width of the feed-forward layers."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        return feed_forward_dim(self.dim, self.multiple_of, self.ffn_dim_multiplier)

    @property
    def stop_ids(self) -> tuple[int, int]:
        """The ids that end a text: after EOS it is over, and at BOS another one begins."""
        return self.bos_token_id, self.eos_token_id

    def validate(self) -> None:
        """Check that a Llama can have this configuration.

        Raises:
            ValueError: it cannot; the message says why.
        """
        for name, value in vars(self).items():
            if value is None and name in OPTIONAL:
                continue
            if name in MAX_COUNTS and not (type(value) is int and 1 <= value <= MAX_COUNTS[name]):
                highest = MAX_COUNTS[name]
                raise ValueError(f"{name} is {value!r}, expected an integer from 1 to {highest}")
            if name in RANGES:
                low, high = RANGES[name]
                if type(value) not in (int, float) or not low <= value < high:
                    expected = f"expected a number from {low} to below {high}"
                    raise ValueError(f"{name} is {value!r}, {expected}")
            if name in ("bos_token_id", "eos_token_id") and not (type(value) is int and value >= 0):
                raise ValueError(f"{name} is {value!r}, expected an integer of 0 or more")
            if name in ("causal", "tie_embeddings") and type(value) is not bool:
                raise ValueError(f"{name} is {value!r}, expected True or False")
        n_kv_heads = self.n_kv_heads or self.n_heads
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if self.n_heads % n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {n_kv_heads}")
        if self.dim // self.n_heads % 2:
            raise ValueError(f"dim / n_heads is {self.dim // self.n_heads}, expected an even one")

    @classmethod
    def from_model_args(cls, model_args: dict[str, Any]) -> "LlamaConfig":
        """Build and validate the configuration that a checkpoint's `model_args` describe.

        `norm_eps` is another name of `layer_norm_eps`. The assignment's unused settings are taken.
        Unknown names are refused, because ignoring one could silently change the model.

        Raises:
            ValueError: a name is unknown, or no Llama can have this configuration.
        """
        arguments = {
            name: value
            for name, value in model_args.items()
            if name not in UNUSED and not (str(name).endswith("_token_id") and value is None)
        }
        for name, expected in FIXED.items():
            if arguments.pop(name, expected) != expected:
                raise ValueError(f"{name} is {model_args[name]!r}, expected {expected!r}")
        if "norm_eps" in arguments:
            epsilon = arguments.pop("norm_eps")
            if arguments.setdefault("layer_norm_eps", epsilon) != epsilon:
                raise ValueError("norm_eps and layer_norm_eps differ")
        known = inspect.signature(cls.__init__).parameters.keys() - {"self", "kwargs"}
        unknown = sorted(str(name) for name in arguments.keys() - known)
        if unknown:
            raise ValueError(f"not understood: {', '.join(unknown)}")
        config = cls(**arguments)
        config.validate()
        return config

    def __repr__(self) -> str:
        used = vars(self).keys() - UNUSED.keys() - FIXED.keys()
        settings = ", ".join(f"{name}={x!r}" for name, x in vars(self).items() if name in used)
        return f"LlamaConfig({settings})"
