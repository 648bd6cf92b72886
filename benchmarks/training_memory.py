"""Memory of each GPU in pre-training, and the bytes that it sends per step, from closed formulas.

    .venv/bin/python -m benchmarks.training_memory --shape 7b --gpus 64 --batch_size 128 --shard

Without --shard every GPU holds the whole model. With it weights, gradients and moments are sharded
over all GPUs (FSDP2). Activations are the tensors that autograd keeps of `llama.py` with the
kernels of `minllama/kernels/cpu.py`. PyTorch and fragmentation come on top: leave a few GiB for
them. --on_cpu is for processes on a CPU.
"""

from dataclasses import dataclass, replace

from config import LlamaConfig
from minllama.common.errors import InputError
from minllama.common.program import positive, run_script, script_parser

FLOAT32, BFLOAT16 = 4, 2
BYTES = {"float32": FLOAT32, "bfloat16": BFLOAT16}
MAX_PLAIN_ATTENTION = 512  # tokens up to which bfloat16 attention on a CPU keeps its scores


@dataclass(frozen=True)
class Training:
    """A model's shape, and its training; `batch_size` is that of all GPUs together."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    context: int
    tied: bool = False  # embedding and head are one matrix
    batch_size: int = 1
    gpus: int = 1
    grad_accum: int = 1
    dtype: str = "float32"
    shard: bool = False
    activation_checkpointing: bool = False
    on_cpu: bool = False

    @property
    def config(self) -> LlamaConfig:
        names = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim")
        numbers = {name: getattr(self, name) for name in names}
        return LlamaConfig(**numbers, max_seq_len=self.context, tie_embeddings=self.tied)

    @property
    def kv_dim(self) -> int:
        return self.dim * self.n_kv_heads // self.n_heads

    @property
    def layer(self) -> int:  # weights of a layer
        return self.dim * (2 * self.dim + 2 * self.kv_dim + 3 * self.hidden_dim + 2)

    @property
    def root(self) -> int:  # weights of embedding, head and last norm
        return (1 if self.tied else 2) * self.vocab_size * self.dim + self.dim

    @property
    def weights(self) -> int:
        return self.n_layers * self.layer + self.root


SHAPES = {
    "5m": Training(2048, 256, 6, 4, 4, 704, 256, tied=True),
    "42m": Training(32000, 512, 8, 8, 8, 1376, 1024, tied=True),
    "1.1b": Training(32000, 2048, 22, 32, 4, 5632, 2048),
    "7b": Training(32000, 4096, 32, 32, 32, 11008, 4096),
}


def layer_activations(t: Training) -> int:
    """Bytes that autograd keeps of one token in one layer."""
    width = BYTES[t.dtype]
    norms = 2 * FLOAT32 * (2 * t.dim + 1)  # both norms keep x, x / rms(x) and 1 / rms(x)
    # Inputs of query, key, value, w1 and w3: autocast casts the norm's output for each of them.
    inputs = width * t.dim * (2 if t.dtype == "float32" else 5)
    # Rotated query and key, value, and attention's output, which is the input of compute_output.
    attention = width * (2 * t.dim + 2 * t.kv_dim) + FLOAT32 * t.n_heads
    if t.on_cpu and t.dtype == "bfloat16" and t.context <= MAX_PLAIN_ATTENTION:
        attention += (FLOAT32 + BFLOAT16) * t.n_heads * t.context
    feed_forward = width * 4 * t.hidden_dim  # w1 x, silu(w1 x), w3 x, and their product
    return norms + inputs + attention + feed_forward


def memory(t: Training) -> dict[str, int]:
    """Bytes on one GPU; "peak" is the most in use at one time, less than the sum of the others."""
    tokens, width = t.batch_size * t.context // t.gpus, BYTES[t.dtype]
    copy = FLOAT32 * t.weights // (t.gpus if t.shard else 1)
    gathered = width * (t.root + min(2, t.n_layers) * t.layer) if t.shard else 0
    of_layer = layer_activations(t) * tokens
    kept = FLOAT32 * t.dim * tokens if t.activation_checkpointing else of_layer
    activations = t.n_layers * kept
    if t.dtype == "bfloat16" and not t.shard:  # autocast's copies of the matrices
        n_layers = 1 if t.activation_checkpointing else t.n_layers
        activations += width * (n_layers * t.layer + t.vocab_size * t.dim)
    # In float32 log-probabilities, their gradients and the logits'; and what the last norm keeps.
    logits = tokens * (3 * FLOAT32 * t.vocab_size + (2 * FLOAT32 + width) * t.dim)
    accumulated = copy if t.grad_accum > 1 else 0  # gradients of the batches before
    denominators = 0 if t.on_cpu else copy  # of AdamW, which works in blocks on a CPU
    at_loss = gathered + accumulated + activations + logits
    at_first_layer = gathered + copy + of_layer + kept
    return {
        "weights": copy,
        "gradients": copy,
        "optimizer moments": 2 * copy,
        "gathered weights": gathered,
        "activations": activations,
        "logits": logits,
        "peak": 3 * copy + max(at_loss, at_first_layer, copy + denominators),
    }


def traffic(t: Training) -> int:
    """Bytes that one GPU sends per step, around a ring of n GPUs.

    Each sends (n - 1) / n of what is gathered or reduced, and twice that in an all-reduce.
    """
    sent = 2 * FLOAT32 * t.weights  # an all-reduce of the gradients
    if t.shard:  # each batch gathers layers twice and the rest once, and reduces gradients
        gathered = BYTES[t.dtype] * (t.weights + t.n_layers * t.layer)
        sent = t.grad_accum * (gathered + FLOAT32 * t.weights)
    return (t.gpus - 1) * sent // t.gpus


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="42m", help="changed by the other flags")
    for name, value in vars(SHAPES["42m"]).items():
        if isinstance(value, bool):
            parser.add_argument(f"--{name}", action="store_const", const=True)
        elif name == "dtype":
            parser.add_argument("--dtype", choices=BYTES)
        else:
            parser.add_argument(f"--{name}", type=positive, metavar="N")
    flags = {name: v for name, v in vars(parser.parse_args()).items() if v is not None}
    t = replace(SHAPES[flags.pop("shape")], **flags)
    if t.batch_size % t.gpus:
        raise InputError(f"--batch_size {t.batch_size}: make it a multiple of --gpus {t.gpus}")
    try:
        t.config.validate()
    except ValueError as error:
        raise InputError(f"{error}; change the flags of the shape") from error
    print(f"{t.weights:,} weights; GiB of each of {t.gpus} GPUs")
    for name, n_bytes in (memory(t) | {"sent in a step": traffic(t)}).items():
        print(f"  {name:26}{n_bytes / 2**30:8.2f}")


if __name__ == "__main__":
    run_script(main)
