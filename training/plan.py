"""How much memory a training takes on each GPU, and what the GPUs send each other, before it runs.

    .venv/bin/python -m training.plan --shape 7b --gpus 64 --context 4096 --batch_size 64 \\
        --shard --dtype bfloat16 --activation_checkpointing

A step of the real model is run, forward and backward, on tensors that have a shape and no memory.
Their bytes are counted as they come and go. Without --shard every GPU holds all weights, gradients
and moments (DDP). With it these are cut over the GPUs of a machine (FSDP2), and each machine holds
all of them.
"""

if __name__ == "__main__":  # the imports below take seconds
    from common.program import end_at_interrupt

    end_at_interrupt()

import contextlib
import weakref
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from base_llama import NoInitialWeights, replace
from common.errors import InputError
from common.program import ArgumentParser, run_script
from common.settings import Settings, add_flags, flag
from config import LlamaConfig
from llama import Llama, RMSNorm, ScaledDotProductAttention
from optimizer import AdamW
from rope import rotary_table_once
from training.checkpointing import checkpoint_activations
from training.cpu import accelerate
from training.step import mixed_precision

SHAPES = {  # stories42M, TinyLlama 1.1B, Llama 2 7B
    "42m": {"dim": 512, "n_layers": 8, "n_heads": 8, "max_seq_len": 1024},
    "1.1b": {
        "dim": 2048,
        "n_layers": 22,
        "n_heads": 32,
        "n_kv_heads": 4,
        "hidden_dim": 5632,
        "max_seq_len": 2048,
        "tie_embeddings": False,
    },
    "7b": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "hidden_dim": 11008,
        "max_seq_len": 4096,
        "tie_embeddings": False,
    },
}
OF_THE_MODEL = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim")
OF_THE_MODEL += ("tie_embeddings",)
CPU = torch.device("cpu")
FLOAT32 = 4  # bytes
GIBIBYTE = 2**30


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Settings):
    """A shape, the GPUs, and how the training is spread over them."""

    title = "plan"

    shape: str | None = flag(
        None, "a known shape, of which the flags below change what they name", choices=tuple(SHAPES)
    )
    vocab_size: int | None = flag(None, "number of token ids (default: 32000)", low=1)
    dim: int | None = flag(None, "width of the residual stream", low=1)
    n_layers: int | None = flag(None, "number of layers", low=1)
    n_heads: int | None = flag(None, "number of query heads", low=1)
    n_kv_heads: int | None = flag(None, "key and value heads (default: as --n_heads)", low=1)
    hidden_dim: int | None = flag(
        None, "width of the feed-forward layers (default: 8/3 of --dim)", low=1
    )
    tie_embeddings: bool | None = flag(
        None, "embedding and head are one matrix (default: as the shape has it, else yes)"
    )
    context: int | None = flag(None, "tokens of a row (default: the shape's context)", low=1)
    gpus: int = flag(1, "GPUs, or processes on CPUs, of all machines together", low=1)
    gpus_per_machine: int = flag(8, "GPUs of one machine", low=1)
    batch_size: int | None = flag(
        None, "rows per batch, of all GPUs together (default: one for each GPU)", low=1
    )
    grad_accum: int = flag(1, "batches per step of training", low=1)
    shard: bool = flag(False, "cut weights, gradients and moments over the GPUs of a machine")
    dtype: str = flag("float32", "of the products", choices=("float32", "bfloat16"))
    activation_checkpointing: bool = flag(
        False, "train in less memory, for the time of one more forward pass"
    )
    device: str = flag("cuda", "whose kernels run", choices=("cuda", "cpu"))
    gpu_memory: float = flag(80.0, "GiB that a GPU, or a process, has")

    @property
    def gpus_of_a_machine(self) -> int:
        return min(self.gpus, self.gpus_per_machine)

    @property
    def machines(self) -> int:
        return self.gpus // self.gpus_of_a_machine

    @property
    def rows(self) -> int:
        """Rows of a batch on one GPU."""
        return (self.batch_size or self.gpus) // self.gpus

    def config(self) -> LlamaConfig:
        """The model's.

        Raises:
            InputError: there is no such model.
        """
        if self.shape is None and None in (self.dim, self.n_layers, self.n_heads):
            raise InputError(
                f"--shape: name one of {', '.join(SHAPES)}, or give --dim, --n_layers and --n_heads"
            )
        numbers = {"n_kv_heads": None, **SHAPES.get(self.shape, {})}
        for name in OF_THE_MODEL:
            if getattr(self, name) is not None:
                numbers[name] = getattr(self, name)
        if self.context is not None:
            numbers["max_seq_len"] = self.context
        config = LlamaConfig(causal=True, **numbers)
        try:
            config.check()
        except ValueError as error:
            raise InputError(f"no such model: {error}") from error
        return config

    def check(self) -> None:
        """See that the flags go together.

        Raises:
            InputError: they do not.
        """
        self.config()
        if self.gpus % self.gpus_of_a_machine:
            raise InputError(
                f"--gpus {self.gpus}: not a multiple of --gpus_per_machine {self.gpus_per_machine}"
            )
        if self.batch_size is not None and self.batch_size % self.gpus:
            raise InputError(
                f"--batch_size {self.batch_size}: the rows of all GPUs, so a multiple of "
                f"--gpus {self.gpus}"
            )
        if self.shard and self.gpus_of_a_machine == 1:
            raise InputError("--shard: a machine has one GPU, so nothing can be cut; leave it out")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes on one GPU, and bytes that it sends in a step.

    Attributes:
        n_weights: of the whole model.
        optimizer: its two moments.
        gathered: whole weights that --shard brings together for the layers at work.
        activations: the most that batches need beside all that: what is kept for the backward pass,
            bfloat16 copies of weights, logits, gradients that are not yet summed.
        temporary: tensors that the optimizer makes in its step, when the activations are gone.
        total: the most that is in use at one time. The sum may be more: gradients come as the
            activations go, and the optimizer's step follows both.
        in_machine, between_machines: sent to other GPUs. Without --shard one ring goes over all
            GPUs, and all of it is `between_machines` where there are several.
    """

    n_weights: int
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    temporary: int
    total: int
    in_machine: int
    between_machines: int


def make_plan(settings: PlanSettings) -> Plan:
    """Compute the memory and the traffic of a training.

    Raises:
        InputError: there is no such training.
    """
    settings.check()
    n_shards = settings.gpus_of_a_machine if settings.shard else 1
    with without_memory():
        llama = build(settings)
        sizes = [p.numel() for p in llama.parameters()]
        n_all = sum(sizes)
        n_layer = sum(p.numel() for p in llama.layers[0].parameters())
        n_root = n_all - n_layer * len(llama.layers)
        memory = memory_of_batches(llama, settings)
    sizes_of_shares = [-(-n // n_shards) for n in sizes]
    temporary = peak_of_optimizer(sizes_of_shares, settings.device)

    share = sum(sizes_of_shares) * FLOAT32
    gathered = 0
    if settings.shard:  # the layer at work and the next one
        width = llama.output.weight.element_size()
        gathered = (n_root + min(2, len(llama.layers)) * n_layer) * width
    sums = 0 if settings.gpus == 1 or settings.shard else share  # DDP has them all the time
    in_batches = gathered + sums + memory.peak_of_all
    in_machine, between_machines = traffic(settings, n_all, n_layer)
    return Plan(
        n_weights=n_all,
        weights=share,
        gradients=share,
        optimizer=2 * share,
        gathered=gathered,
        activations=memory.peak,
        temporary=temporary,
        total=3 * share + max(in_batches, share + temporary),
        in_machine=in_machine,
        between_machines=between_machines,
    )


def traffic(settings: PlanSettings, n_all: int, n_layer: int) -> tuple[int, int]:
    """Bytes that a GPU sends in a step, in its machine and between machines.

    All-reduce, all-gather and reduce-scatter go around a ring: of n GPUs each sends (n-1)/n of the
    bytes, and twice that for an all-reduce.

    Args:
        n_all: number of weights.
        n_layer: of them those of a layer.
    """
    gpus, machines = settings.gpus, settings.machines
    if not settings.shard:  # once a step, the gradients
        n_bytes = 2 * (gpus - 1) * n_all * FLOAT32 // gpus
        return (0, n_bytes) if machines > 1 else (n_bytes, 0)
    n = settings.gpus_of_a_machine
    n_of_layers = n_layer * settings.config().n_layers
    width = 2 if settings.dtype == "bfloat16" else FLOAT32
    # In each batch: layers are gathered forward and backward, the rest once; gradients are cut.
    of_a_batch = (n_all + n_of_layers) * width + n_all * FLOAT32
    in_machine = (n - 1) * of_a_batch * settings.grad_accum // n
    # Once a step: each share of the gradients, over the machines.
    return in_machine, 2 * (machines - 1) * n_all * FLOAT32 // (n * machines)


# A step without memory


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Let tensors have a shape and no memory, and no initial weights.

    They are PyTorch's fake tensors: on the meta device, but taken for tensors on a CPU, so that
    autocast and the choice of kernels work.
    """
    rotary_table_once.cache_clear()  # a real table cannot be used here, nor one from here elsewhere
    try:
        with FakeTensorMode(), NoInitialWeights():
            yield
    finally:
        rotary_table_once.cache_clear()


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that operations make, from when they come until they go.

    Args:
        known: tensors that are not counted.

    Attributes:
        live, peak: bytes now, and the most so far, without what was set aside.
        peak_of_all: the most so far, with it.
    """

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.live = self.peak = self.peak_of_all = 0
        self._aside: dict[int, int] = {}  # bytes by storage
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += n_bytes
        self.peak = max(self.peak, self.live)
        self.peak_of_all = max(self.peak_of_all, self.live + sum(self._aside.values()))
        weakref.finalize(storage, self._forget, key, n_bytes).atexit = False

    def _forget(self, key: int, n_bytes: int) -> None:
        self._known.remove(key)
        if self._aside.pop(key, None) is None:
            self.live -= n_bytes

    def set_aside(self, tensor: torch.Tensor) -> None:
        """Count a tensor apart from now on."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._aside:
            self._aside[storage._cdata] = storage.nbytes()
            self.live -= storage.nbytes()


class FusedKernel(torch.autograd.Function):
    """What a GPU does in one kernel: for the backward pass it keeps a number for each row."""

    @staticmethod
    def forward(ctx: Any, keeps_output: bool, *inputs: torch.Tensor) -> torch.Tensor:
        """The inputs are kept; the output is as the first of them."""
        output = torch.empty_like(inputs[0])
        per_row = output.new_empty(output.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(*inputs, per_row, *([output] if keeps_output else []))
        ctx.n_inputs = len(inputs)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = ctx.saved_tensors[: ctx.n_inputs]
        return (None, *(torch.empty_like(x) for x in inputs))


class FusedAttention(ScaledDotProductAttention):
    """Attention as memory sees it on a GPU; nothing of seqlen² is made."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments and result are those of its base."""
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else query.dtype
        return FusedKernel.apply(True, *(x.to(dtype) for x in (query, key, value)))


class GPUNorm(RMSNorm):
    """`training.cpu.FusedNorm` as memory sees it on a GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, dim)` to the same shape."""
        if x.dtype == self.weight.dtype == torch.float32:
            return FusedKernel.apply(False, x, self.weight)
        return FusedKernel.apply(False, x.float()).type_as(x) * self.weight


def build(settings: PlanSettings) -> Llama:
    """The model as it is trained; with --shard its weights are as they are gathered."""
    gathered_in_bfloat16 = settings.shard and settings.dtype == "bfloat16"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if gathered_in_bfloat16 else before)
    try:
        llama = Llama(settings.config())
    finally:
        torch.set_default_dtype(before)
    if settings.device == "cpu":
        accelerate(llama)
    else:
        for name, module in list(llama.named_modules()):
            if type(module) is ScaledDotProductAttention:
                replace(llama, name, FusedAttention(llama.config))
            elif type(module) is RMSNorm:
                replace(llama, name, GPUNorm(llama.config.dim))
    if settings.activation_checkpointing:
        checkpoint_activations(llama.layers)
    return llama


def memory_of_batches(llama: Llama, settings: PlanSettings) -> LiveBytes:
    """What is counted beside weights, moments and DDP's sums while the batches of a step run.

    Gradients that stay for the optimizer are set aside.
    """
    tokens = torch.zeros(settings.rows, llama.config.max_seq_len, dtype=torch.long)
    with LiveBytes([tokens, *llama.parameters()]) as memory:
        if settings.shard:
            reduce_by_layer(llama, settings.gpus_of_a_machine, memory)
        elif settings.gpus == 1:
            for parameter in llama.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: memory.set_aside(p.grad))
        n_batches = min(2, settings.grad_accum)  # the third is like the second
        for i in range(n_batches):
            if settings.gpus > 1 and not settings.shard and i == n_batches - 1:
                # In the last batch DDP copies a gradient into its sum when it is there.
                for parameter in llama.parameters():
                    parameter.register_post_accumulate_grad_hook(clear)
            loss(llama, tokens, settings.dtype).backward()
    return memory


def loss(llama: Llama, tokens: torch.Tensor, dtype: str) -> torch.Tensor:
    """The mean cross-entropy, as `tasks/scores.py` computes it."""
    with mixed_precision(CPU, dtype):
        logits = llama.output(llama.hidden_states(tokens))
    flat = logits.flatten(0, 1)
    losses = F.cross_entropy(flat.float(), tokens.flatten(), reduction="none")
    return losses.sum() / tokens.numel()


def clear(parameter: torch.Tensor) -> None:
    """Free a gradient that is no longer needed."""
    parameter.grad = None


def reduce_by_layer(llama: Llama, n_shards: int, memory: LiveBytes) -> None:
    """Do with gradients what FSDP2 does.

    When all gradients of a layer are there they are copied into one float32 buffer, of which each
    GPU keeps its share of the sum. The buffer is freed when the next one is needed. Embedding, last
    norm and head are as a layer that is complete at the end.
    """
    in_flight: list[torch.Tensor] = []

    def reduce_together(parameters: list[nn.Parameter]) -> None:
        shares: list[torch.Tensor] = []

        def arrived(_parameter: torch.Tensor) -> None:
            if all(parameter.grad is not None for parameter in parameters):
                n_elements = sum(parameter.numel() for parameter in parameters)
                in_flight.clear()
                in_flight.append(torch.empty(n_elements, dtype=torch.float32))
                if not shares:
                    shares.append(torch.empty(-(-n_elements // n_shards), dtype=torch.float32))
                    memory.set_aside(shares[0])
                for parameter in parameters:
                    clear(parameter)

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(arrived)

    groups = [list(layer.parameters()) for layer in llama.layers]
    of_layers = {parameter for group in groups for parameter in group}
    for group in [*groups, [p for p in llama.parameters() if p not in of_layers]]:
        reduce_together(group)


def peak_of_optimizer(sizes: list[int], device: str) -> int:
    """The most bytes of temporary tensors in a step of AdamW, for parameters of some sizes."""
    device = "cpu" if device == "cpu" else "meta"  # it goes through a CPU's in blocks
    with FakeTensorMode() if device == "cpu" else contextlib.nullcontext():
        parameters = [nn.Parameter(torch.empty(n, device=device)) for n in sizes]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer = AdamW(parameters)
        optimizer.step()  # makes the moments
        known = [*parameters, *(p.grad for p in parameters)]
        for state in optimizer.state.values():
            known += [state["exp_avg"], state["exp_avg_sq"]]
        with LiveBytes(known) as memory:
            optimizer.step()
    return memory.peak


# The report


def describe(settings: PlanSettings, plan: Plan) -> str:
    """What is planned, as text for people."""
    config, machines = settings.config(), settings.machines
    worker, workers = ("process", "processes") if settings.device == "cpu" else ("GPU", "GPUs")
    rows, tokens = settings.rows * settings.gpus, config.max_seq_len
    what = f"{settings.gpus} {workers if settings.gpus > 1 else worker}"
    if machines > 1:
        what += f" on {machines} machines"
    lines = [
        f"{plan.n_weights:,} weights, {what}, {settings.dtype}",
        f"a batch: {rows} x {tokens:,} tokens, {settings.rows} x {tokens:,} on each {worker}; "
        f"a step: {rows * tokens * settings.grad_accum:,} tokens",
        "",
        f"{f'memory of each {worker}':28}{'GiB':>8}",
        line("weights", plan.weights),
        line("gradients", plan.gradients),
        line("optimizer", plan.optimizer),
        line("gathered weights", plan.gathered),
        line("activations", plan.activations),
        line("the optimizer's step", plan.temporary),
        line("at most at one time", plan.total),
        "",
        f"{f'each {worker} sends in a step':28}{'GiB':>8}",
        line("within its machine", plan.in_machine),
        line("between machines", plan.between_machines),
    ]
    return "\n".join(lines)


def line(name: str, n_bytes: int) -> str:
    return f"  {name:26}{n_bytes / GIBIBYTE:8.2f}"


def advice(settings: PlanSettings, plan: Plan) -> Iterator[str]:
    """Whether it fits, and if not, which flags would lower it, one added to the other."""
    limit = settings.gpu_memory
    if plan.total <= limit * GIBIBYTE:
        yield f"It fits in {limit:g} GiB."
        return
    yield f"It does not fit in {limit:g} GiB. Lower, each with those before it:"
    for flags, changes in savings(settings):
        settings = settings.replace(**changes)
        plan = make_plan(settings)
        yield line(flags, plan.total)
        if plan.total <= limit * GIBIBYTE:
            return
    more = "more GPUs in a machine, " if settings.shard else ""
    yield f"That is not enough: {more}a shorter --context or a smaller model."


def savings(settings: PlanSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Flags that lower the memory and leave the model as it is, and what they set."""
    if not settings.shard and settings.gpus_of_a_machine > 1:
        yield "--shard", {"shard": True}
    if not settings.activation_checkpointing:
        yield "--activation_checkpointing", {"activation_checkpointing": True}
    if settings.dtype == "float32":
        yield "--dtype bfloat16", {"dtype": "bfloat16"}
    rows, grad_accum = settings.rows, settings.grad_accum
    while rows > 1:
        divisor = 2 if rows % 2 == 0 else rows
        rows, grad_accum = rows // divisor, grad_accum * divisor
        changes = {"batch_size": rows * settings.gpus, "grad_accum": grad_accum}
        yield f"--batch_size {rows * settings.gpus} --grad_accum {grad_accum}", changes


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_flags(parser, [PlanSettings])
    settings = PlanSettings.from_args(parser.parse_args())
    plan = make_plan(settings)
    print(f"{describe(settings, plan)}\n")
    for text in advice(settings, plan):
        print(text, flush=True)


if __name__ == "__main__":
    run_script(main)
