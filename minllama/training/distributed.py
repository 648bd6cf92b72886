"""Several processes, on torch's engine: how they start, agree, share the work, and end together.

`torchrun` starts them. Each computes its share of every batch, and their gradients are added up. By
default each holds the whole model (DistributedDataParallel); with `--shard` a part of it (FSDP2).
Where there is one process, all of this does nothing.

`python -m minllama.training.distributed` takes what `torchrun` takes. It ends with the exit code of the
program, and without a page of traceback behind the program's own error.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minllama.common.errors import InputError, print_error, user_message

T = TypeVar("T")

TIMEOUT = "MINLLAMA_TIMEOUT"  # environment variable: seconds to wait for another process
ERROR, TOLD, FIRST, LEFT = "error", "told", "first", "left"  # keys of the store
PATIENCE = timedelta(seconds=3)  # of the first process, with those that are to leave before it
OWN_SEED = 1_000_003  # a prime, so that no two steps and processes draw alike by accident


# Start and end


class _Together:
    """What the processes share beside torch's process group: the store that they met at."""

    store: dist.Store | None = None
    waits = itertools.count()  # names the waits for the first process, alike everywhere


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that `torchrun` started, and leave them together.

    Only the first process has a voice: standard output and error of the others go nowhere. An error
    that a user can cause is told once, whichever process has it, and ends all of them with exit
    code 2.

    Raises:
        SystemExit: for such an error.
    """
    n_processes = n_started()
    if n_processes == 1:
        yield
        return
    rank, stderr = int(os.environ["RANK"]), sys.stderr
    with contextlib.ExitStack() as stack:
        if rank > 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            _connect(rank, n_processes)
            yield
        except Exception as error:
            message = user_message(error) or _lost_contact(error)
            if message is None and not _another_failed():
                sys.stderr = stderr  # a bug: its traceback is for everyone to see
                raise
            with contextlib.redirect_stderr(stderr):
                _tell_once(message)
            _leave(rank, n_processes)
            sys.exit(2)
    dist.destroy_process_group()
    _leave(rank, n_processes)
    _Together.store = None


def n_started() -> int:
    """How many processes `torchrun` started, of which this is one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _leave(rank: int, n_processes: int) -> None:
    """Let the first process, which has the store, be the last one that leaves it."""
    if _Together.store is None:
        return
    with contextlib.suppress(dist.DistError):  # the others, or the first one, are gone
        if rank > 0:
            _Together.store.set(f"{LEFT}-{rank}", "")
        else:
            _Together.store.wait([f"{LEFT}-{i}" for i in range(1, n_processes)], PATIENCE)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Around a whole program: end a process that `torchrun` started without any destructors.

    Those of PyTorch's threads abort such a process now and then, with code -6, when all its work
    is done.
    """
    code = 0
    try:
        yield
    except SystemExit as stop:
        if n_started() == 1 or isinstance(stop.code, str):  # which Python prints
            raise
        code = stop.code or 0
    if n_started() > 1:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def _connect(rank: int, n_processes: int) -> None:
    try:
        seconds = float(os.environ.get(TIMEOUT, 600))
        timeout = timedelta(seconds=seconds)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{TIMEOUT}={os.environ[TIMEOUT]}: not a number of seconds") from error
    cuda = torch.cuda.is_available()
    if cuda:
        local_rank, n_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise InputError(
                f"process {rank} is number {local_rank + 1} of its machine, which has {n_gpus} "
                "GPUs, and each takes one; start fewer with --nproc_per_node, or hide the GPUs "
                "with CUDA_VISIBLE_DEVICES="
            )
        torch.cuda.set_device(local_rank)
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store may be an old one
        _Together.store = dist.PrefixStore(f"attempt-{attempt}", store)
        _Together.waits = itertools.count()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=_Together.store,
            rank=rank,
            world_size=n_processes,
            timeout=max(timeout, timedelta(minutes=30)) if TIMEOUT not in os.environ else timeout,
        )
    except (RuntimeError, ValueError) as error:
        if _another_failed():
            raise
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(
            f"process {rank} of {n_processes} on {socket.gethostname()} could not reach the others "
            f"at {place} within {seconds:g} s; see that all are started and that the address can "
            f"be reached, or give them longer with {TIMEOUT}=SECONDS"
        ) from error


def _lost_contact(error: Exception) -> str | None:
    """What to say of an error of the network, or None if it is none."""
    text = " ".join(str(error).split())
    is_network = isinstance(error, dist.DistError) or "gloo" in text.lower() or "NCCL" in text
    if not isinstance(error, RuntimeError) or not is_network or _another_failed():
        return None
    return f"process {rank()} lost contact with another process, or waited too long: {text[:200]}"


def _another_failed() -> bool:
    """Whether an error was told. A process sets this before it ends, and the others notice."""
    with contextlib.suppress(RuntimeError):
        return _Together.store is not None and _Together.store.check([ERROR])
    return False


def _tell_once(message: str | None) -> None:
    """Let the first process that gets here print an error; the others wait until it has."""
    try:
        if message is not None and _Together.store.add(ERROR, 1) == 1:
            print_error(message)
            _Together.store.set(TOLD, "")
        else:
            _Together.store.wait([TOLD], timedelta(seconds=10))
    except (RuntimeError, AttributeError):  # there is no store, or no more
        if message is not None:
            print_error(message)


def agree(values: dict[str, Any]) -> None:
    """See that all processes were started alike: flags, files, versions.

    Raises:
        InputError: they were not; the message names what differs.
    """
    if n_processes() == 1:
        return
    everyone = gathered_objects(values | {"host": socket.gethostname()})
    for other, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if name != "host" and theirs.get(name) != value:
                raise InputError(
                    f"{name} is {value} for process 0 on {everyone[0]['host']}, but "
                    f"{theirs.get(name)} for process {other} on {theirs['host']}; start all alike"
                )


def digest_of_code() -> str:
    """The beginning of the SHA-256 of all modules of this project, and PyTorch's version."""
    root = Path(__file__).parent.parent.parent
    digest = hashlib.sha256()
    for path in sorted({*root.glob("*.py"), *root.glob("[a-z]*/*.py")}):
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()[:16]} with PyTorch {torch.__version__}"


# Who is who


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _is_together() else 0


def n_processes() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _is_together() else 1


def is_first() -> bool:
    """Whether this is the process that prints, writes files and holds the lock."""
    return rank() == 0


def _is_together() -> bool:
    return dist.is_available() and dist.is_initialized()


def describe() -> str:
    """Of several processes how many there are, as it follows the name of a device."""
    return f" in {n_processes()} processes" if n_processes() > 1 else ""


def first_alone(do: Callable[[], T]) -> T:
    """Do something in the first process, then in the others, which find what it has left."""
    result = do() if is_first() else None
    _wait_for_first()
    return result if is_first() else do()


def on_first(do: Callable[[], Any]) -> None:
    """Do something in the first process only, while the others wait, however long that takes."""
    if is_first():
        do()
    _wait_for_first()


def _wait_for_first() -> None:
    if n_processes() == 1:
        return
    key, pause = f"{FIRST}-{next(_Together.waits)}", 0.001
    if is_first():
        _Together.store.set(key, "")
    while not _Together.store.check([key]):
        if _another_failed():
            sys.exit(2)
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


# The work of each


def share(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], bool]:
    """This process's rows of a batch, padded as the whole batch is.

    Args:
        tensors: of one batch, with a row in each for every example.

    Returns:
        the rows of each tensor; and whether they count. Where there are fewer rows than processes,
        some get the first row, which does not: its loss is to be multiplied by 0, so that all
        processes take part in adding up the gradients.
    """
    if n_processes() == 1:
        return list(tensors), True
    n, n_rows = n_processes(), len(tensors[0])
    begin, end = (n_rows * r // n for r in (rank(), rank() + 1))
    counts = begin < end
    return [tensor[begin:end] if counts else tensor[:1] for tensor in tensors], counts


def rounds(batches: Iterable[T]) -> Iterator[tuple[list[T], T, bool]]:
    """Share out whole batches, one for each process in every round.

    Every process gets as many, so that those that hold parts of one model stay in step.

    Yields:
        the batches of a round; the one that this process computes; and whether that counts, as it
        does not where the last round has no batch for this process.
    """
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, n_processes())):
        counts = rank() < len(group)
        yield group, group[rank()] if counts else group[-1], counts


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    if n_processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def gathered_objects(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if n_processes() == 1:
        return [value]
    everyone: list[Any] = [None] * n_processes()
    dist.all_gather_object(everyone, value)
    return everyone


def in_rounds(mine: list[T]) -> list[T]:
    """What the processes computed in `rounds`, in the order of the batches."""
    columns = itertools.zip_longest(*gathered_objects(mine), fillvalue=None)
    return [item for column in columns for item in column if item is not None]


@contextlib.contextmanager
def own_draws(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Let dropout draw other numbers in every process and step; afterwards all draw alike again.

    They depend on seed, step and process only, so that a run that goes on draws what it would have.
    One process draws on as ever.
    """
    if n_processes() == 1:
        yield
        return
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        own_seed = (seed * OWN_SEED + step) * OWN_SEED + rank()
        torch.manual_seed(own_seed % 2**63)  # which is as large as a seed can be
        yield


# One model in all of them


def data_parallel(step: nn.Module, *, all_used: bool) -> nn.Module:
    """A module that adds up the gradients of all processes in the backward pass.

    Args:
        step: what is called with a share of a batch, once for a backward pass.
        all_used: whether every parameter that trains gets a gradient in each call.
    """
    is_sharded = any(isinstance(module, _fsdp_class()) for module in step.modules())
    if n_processes() == 1 or is_sharded:
        return step
    return DistributedDataParallel(
        step,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=not all_used,
    )


def shard(model: nn.Module, layers: nn.ModuleList, dtype: str) -> bool:
    """Let each process hold a part of every tensor; whole layers come together as they are needed.

    The parts are spread over the processes of a machine, and every machine has a copy. Where each
    machine has one process, they are spread over the machines.

    Args:
        dtype: of parameters and products; gradients are added up in float32.

    Returns:
        whether it was done; with one process it is not.
    """
    if n_processes() == 1:
        print("--shard: there is one process, so that it gains nothing", file=sys.stderr)
        return False
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    n, per_machine = n_processes(), int(os.environ.get("LOCAL_WORLD_SIZE", n_processes()))
    shape, names = (n,), ("shard",)
    if 1 < per_machine < n and n % per_machine == 0:
        shape, names = (n // per_machine, per_machine), ("copy", "shard")
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return True


def add_up_now(step: nn.Module, now: bool) -> None:
    """Say whether the next backward pass adds up the gradients of all processes, or a later one.

    Parts of gradients are always added up within a machine, since no process has room for the
    whole; then only the machines wait.

    Args:
        step: what `data_parallel` returned.
    """
    if isinstance(step, DistributedDataParallel):
        step.require_backward_grad_sync = now
    elif n_processes() > 1:
        for module in step.modules():
            if isinstance(module, _fsdp_class()):
                module.set_requires_all_reduce(now, recurse=False)


def keep_parts(model: nn.Module) -> None:
    """Let a sharded model hold parts only. After an evaluation some of its tensors are whole."""
    for module in model.modules():
        if isinstance(module, _fsdp_class()):
            module.reshard()


def whole(value: Any) -> Any:
    """The same with whole tensors for those that are in parts, in dicts, lists and tuples too.

    All processes have to call it together. The others than the first keep their parts.
    """
    if n_processes() == 1:
        return value
    if hasattr(value, "full_tensor"):
        tensor = value.full_tensor()
        return tensor.cpu() if is_first() else value
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value


def _fsdp_class() -> type:
    """The class of sharded modules, without importing it where there can be none."""
    if n_processes() == 1:
        return type(None)
    from torch.distributed.fsdp import FSDPModule

    return FSDPModule


def launch() -> None:
    """What `torchrun` does, with the exit code of the process that failed first.

    A signal ends it as a shell would say: Ctrl-C with 130.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.ERROR)  # PyTorch's loggers have levels of their own
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    launch()
