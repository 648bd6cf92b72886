"""Data-parallel training in the processes that `torchrun` starts.

Every process holds the model and computes its own examples of each batch; an all-reduce after the
backward pass sums the gradients. With `--shard` every process holds a shard of the model instead
(FSDP2), which sums gradients during the backward pass. In one process all of this does nothing.
"""

import contextlib
import itertools
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import nn

from minllama.common.errors import InputError, print_error, user_message

T = TypeVar("T")

SEED_PRIME = 1_000_003  # keeps the seeds of different steps and ranks apart


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that `torchrun` started; only rank 0 prints.

    An error that a user can cause ends every process that meets it with exit code 2. Rank 0 prints
    its own. Another rank prints one only if rank 0 has not failed too: torchrun ends all processes
    as soon as one has failed.

    Raises:
        InputError: the environment describes no group of processes.
    """
    n_processes = environment_number("WORLD_SIZE", low=1, default="1")
    if n_processes == 1:
        yield
        return
    env_rank = environment_number("RANK", high=n_processes - 1)
    environment_number("MASTER_PORT", high=2**16 - 1)
    stderr = sys.stderr
    with contextlib.ExitStack() as stack:
        if env_rank > 0:
            devnull = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
            stack.enter_context(contextlib.redirect_stderr(devnull))
        try:
            _init_process_group(env_rank)
            yield
        except Exception as error:
            sys.stderr = stderr
            message, text = user_message(error), " ".join(str(error).split())
            if message is None:
                if not isinstance(error, RuntimeError) or not ("gloo" in text or "NCCL" in text):
                    raise
                message = f"rank {rank()} lost the connection to another process: {text[:200]}"
                time.sleep(10)  # torchrun ends this process when the one that failed has ended
            if env_rank == 0:
                raise InputError(message) from error
            time.sleep(5)  # if rank 0 has failed too, torchrun ends this process meanwhile
            print_error(f"rank {env_rank} on {socket.gethostname()}: {message}")
            sys.exit(2)
    dist.destroy_process_group()


def environment_number(
    name: str, low: int = 0, high: int = 2**31 - 1, default: str | None = None
) -> int:
    """Read a number that `torchrun` gives to the processes it starts, or raise InputError."""
    text = os.environ.get(name, default)
    if text is None or not text.isdecimal() or not low <= int(text) <= high:
        found = "is not set" if text is None else f"is {text!r}, not a number from {low} to {high}"
        raise InputError(f"{name} {found}; start with torchrun, or unset WORLD_SIZE")
    return int(text)


def _init_process_group(rank: int) -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        local_rank = environment_number("LOCAL_RANK", default="0")
        n_gpus = torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise InputError(
                f"{local_rank + 1} processes for {n_gpus} GPUs; start fewer with --nproc_per_node, "
                "or train on the CPU with CUDA_VISIBLE_DEVICES="
            )
        torch.cuda.set_device(local_rank)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise InputError(
                f"{address}: the port is taken; choose another --master_port"
            ) from error
        raise InputError(
            f"rank {rank} on {socket.gethostname()} could not reach the other processes at "
            f"{address}; check that all are started and that the address can be reached"
        ) from error


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_rank0() -> bool:
    """Whether this is the process that prints, writes files and holds locks."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def on_rank0(do: Callable[[], Any]) -> None:
    """Call a function on rank 0 while the others wait."""
    if is_rank0():
        do()
    barrier()


def rank0_first(do: Callable[[], T]) -> T:
    """Call a function on rank 0, then on the others, which find the files that it left."""
    if is_rank0():
        result = do()
        barrier()
        return result
    barrier()
    return do()


def all_gather(value: T) -> list[T]:
    """Return the values of all processes, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def require_one_process(option: str) -> None:
    """Check that an option that does not train runs in one process.

    Raises:
        InputError: it runs in several.
    """
    if world_size() > 1:
        raise InputError(f"--option {option}: runs in one process; leave torchrun out")


def assert_same_on_all_ranks(values: dict[str, Any]) -> None:
    """Check that all processes have the same flags and files.

    Raises:
        InputError: they have not; the message names the first difference.
    """
    everyone = all_gather(values | {"PyTorch": torch.__version__})
    for other, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs.get(name) != value:
                raise InputError(
                    f"{name} is {value} on rank 0, but {theirs.get(name)} on rank {other}; "
                    "start all processes alike"
                )


def local_slice(n: int) -> tuple[slice, int]:
    """Split a batch of n examples among the processes.

    Returns:
        the examples of this process, and the weight of their loss: 1, or 0 where a batch has fewer
        examples than processes. Some then compute the first example, because all processes have to
        take part in the collective operations of a backward pass.
    """
    start, stop = (n * r // world_size() for r in (rank(), rank() + 1))
    return (slice(start, stop), 1) if start < stop else (slice(0, 1), 0)


def rounds(batches: Iterable[T]) -> Iterator[tuple[list[T], T, bool]]:
    """Deal out whole batches, one to every process in each round.

    Every process computes as many, so that processes with shards of one model stay in step.

    Yields:
        the batches of a round; the batch of this process; and whether that counts, which it does
        not if the last round has none for this process.
    """
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, world_size())):
        counts = rank() < len(group)
        yield group, group[rank()] if counts else group[-1], counts


def gather_rounds(mine: list[T]) -> list[T]:
    """Return the results of all processes' `rounds` in the order of the batches."""
    columns = itertools.zip_longest(*all_gather(mine))
    return [item for column in columns for item in column if item is not None]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(model: nn.Module) -> None:
    """Sum the gradients of all processes. A sharded model has done so in its backward pass."""
    if world_size() == 1 or is_sharded(model):
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    pending = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
    for work in pending:
        work.wait()


@contextlib.contextmanager
def rank_rng(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Give every process its own random numbers for a step, as dropout needs.

    They depend on seed, step and rank only, so that a resumed run draws the same. Afterwards all
    processes draw alike again. In one process the global generator is left unchanged.
    """
    if world_size() == 1:
        yield
        return
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        rank_seed = (seed * SEED_PRIME + step) * SEED_PRIME + rank()
        torch.manual_seed(rank_seed % 2**63)
        yield


def shard(model: nn.Module, layers: nn.ModuleList, dtype: str) -> bool:
    """Shard every tensor of a model over the processes (FSDP2); layers are gathered when needed.

    Args:
        dtype: precision of gathered parameters and products; gradients are summed in float32.

    Returns:
        whether it was done; a single process has nothing to shard.
    """
    if world_size() == 1:
        print("--shard: only one process runs, so nothing is sharded", file=sys.stderr)
        return False
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*layers, model):
        sharded = fully_shard(module, mp_policy=policy)
        # Sum the gradients, as `sum_gradients` does, in place of their mean.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    return True


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has sharded a model."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Free the parameters that an evaluation has left gathered."""
    if is_sharded(model):
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def full_tensors(value: Any) -> Any:
    """Gather the sharded tensors in dicts, lists and tuples on rank 0's CPU.

    All processes have to call it. The others keep their shards.
    """
    if hasattr(value, "full_tensor"):
        tensor = value.full_tensor()
        return tensor.cpu() if is_rank0() else value
    if isinstance(value, dict):
        return {key: full_tensors(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(full_tensors(item) for item in value)
    return value
