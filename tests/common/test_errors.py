"""Which errors are one line, and what it tells."""

import errno

import pytest
import torch

from minllama.common.errors import InputError, explain_out_of_memory, print_error, user_message
from minllama.common.program import run_script


def test_errors_of_the_users_end_in_one_line_and_ours_in_a_traceback(capsys, tmp_path):
    def user_error():
        raise InputError("this,\nthat")

    def missing_file():
        (tmp_path / "absent").read_bytes()

    def our_error():
        raise ValueError

    for main, line in (
        (user_error, "error: this, that\n"),
        (missing_file, f"error: {tmp_path}/absent: No such file or directory\n"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_script(main)
        assert stop.value.code == 2
        assert capsys.readouterr().err == line
    with pytest.raises(ValueError):
        run_script(our_error)


CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.2 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory: you tried "
CPU += "to allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (torch.OutOfMemoryError(CUDA), "2.5 GiB asked for "),
        (RuntimeError(CPU), "4.00 GiB asked for "),
        (RuntimeError("unable to mmap 1048576 bytes from file <x>: Cannot allocate memory (12)"),
         "1.0 MiB asked for "),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), ""),
        (RuntimeError("could not create a primitive"), ""),
        (ImportError("x.so: failed to map segment from shared object"), ""),
        (MemoryError(), ""),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
    ],
    ids=["cuda", "cpu", "mmap", "cublas", "onednn", "library", "python", "system"],
)  # fmt: skip
def test_too_little_memory_tells_how_much_for_what_and_what_takes_less(capsys, error, size):
    def main():
        with (
            explain_out_of_memory("fine-tuning", "lower --batch_size"),
            explain_out_of_memory("step 3"),
        ):
            raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2
    line = f"error: out of memory: {size}while step 3; lower --batch_size\n"
    assert capsys.readouterr().err == line


def test_other_errors_are_left_alone():
    error = RuntimeError("shape '[3]' is invalid for input of size 4")
    with pytest.raises(RuntimeError), explain_out_of_memory("step 3", "lower --batch_size"):
        raise error
    assert user_message(error) is None and not hasattr(error, "__notes__")


def test_a_long_error_is_cut_in_the_middle(capsys):
    print_error("what " + "x\n" * 1_000_000 + "; what to do")
    line = capsys.readouterr().err
    assert line.startswith("error: what x x") and line.endswith("x ; what to do\n")
    assert len(line) < 1100 and line.count("\n") == 1 and "…" in line
