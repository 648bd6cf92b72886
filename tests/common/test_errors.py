"""User errors end in one line; all others keep their traceback."""

import errno

import pytest
import torch

from minllama.common.errors import InputError, explain_out_of_memory, print_error, user_message
from minllama.common.program import run_script


def raise_(error: Exception):
    raise error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("this,\nthat"), "this, that"),
        (FileNotFoundError(errno.ENOENT, "No such file", "absent"), "absent: No such file"),
    ],
)
def test_user_errors_end_in_one_line(capsys, error, line):
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: raise_(error))
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ValueError):
        run_script(lambda: raise_(ValueError()))
    error = RuntimeError("shape '[3]' is invalid for input of size 4")
    with pytest.raises(RuntimeError), explain_out_of_memory("step 3", "lower --batch_size"):
        raise error
    assert user_message(error) is None and not hasattr(error, "__notes__")


CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.2 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory: you tried "
CPU += "to allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (torch.OutOfMemoryError(CUDA), "2.50 GiB asked for "),
        (RuntimeError(CPU), "4.00 GiB asked for "),
        (RuntimeError("unable to mmap 1048576 bytes from file <x>: Cannot allocate memory (12)"),
         "0.00 GiB asked for "),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), ""),
        (RuntimeError("could not create a primitive"), ""),
        (ImportError("x.so: failed to map segment from shared object"), ""),
        (MemoryError(), ""),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
    ],
    ids=["cuda", "cpu", "mmap", "cublas", "onednn", "library", "python", "system"],
)  # fmt: skip
def test_out_of_memory_names_the_size_the_work_and_a_remedy(capsys, error, size):
    def main():
        with (
            explain_out_of_memory("fine-tuning", "lower --batch_size"),
            explain_out_of_memory("loading", "take a smaller model"),
        ):
            raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2
    line = f"error: out of memory: {size}while loading; take a smaller model\n"
    assert capsys.readouterr().err == line


def test_a_long_error_loses_its_middle(capsys):
    print_error("what " + "x\n" * 1_000_000 + "; what to do")
    line = capsys.readouterr().err
    assert line.startswith("error: what x x") and line.endswith("x ; what to do\n")
    assert len(line) < 1100 and line.count("\n") == 1
