"""What tells the files of a run from others."""

import hashlib
import os
import sys

import pytest

from minllama.common.files import file_fingerprint

BLOCK = 1 << 16


def beginning(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def test_a_file_of_up_to_a_gigabyte_is_told_by_all_of_it(tmp_path):
    """As ever, so that runs from before go on."""
    data = bytes(range(256)) * 1000
    (tmp_path / "a.txt").write_bytes(data)
    assert file_fingerprint(tmp_path / "a.txt") == f"a.txt {beginning(data)}"
    (tmp_path / "empty").write_bytes(b"")
    assert file_fingerprint(tmp_path / "empty") == f"empty {beginning(b'')}"


def test_a_folder_is_told_by_its_files(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).write_text(name)
    names = "".join(f"{name} {beginning(name.encode())}" for name in ("a", "b"))
    assert file_fingerprint(tmp_path) == f"{tmp_path.name} {beginning(names.encode())}"


def test_a_larger_file_is_told_by_its_size_and_evenly_spaced_blocks(tmp_path):
    path, size = tmp_path / "a.bin", (1 << 30) + 12_345
    with path.open("wb") as file:  # sparse where the system has that
        file.truncate(size)
        file.seek(300_000_000)
        file.write(b"between the blocks")
    starts = [i * (size - BLOCK) // 255 for i in range(256)]
    assert (starts[0], starts[-1]) == (0, size - BLOCK)
    seen = bytearray(256 * BLOCK)
    assert not any(start - 18 < 300_000_000 < start + BLOCK for start in starts)
    assert file_fingerprint(path) == f"a.bin {size} {beginning(seen)}"
    for i, place in ((0, 0), (100, starts[100] + 5), (255, size - 1)):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen[i * BLOCK + place - starts[i]] = ord("x")
        assert file_fingerprint(path) == f"a.bin {size} {beginning(seen)}"


@pytest.mark.parametrize("size", [10, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_what_counts_as_large_can_be_said(tmp_path, size):
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "a.bin").write_bytes(data)
    starts = [i * (size - BLOCK) // 255 for i in range(256)]
    blocks = b"".join(data[start : start + BLOCK] for start in starts)
    large = f"a.bin {size} {beginning(blocks)}"
    expected = large if size > BLOCK else f"a.bin {beginning(data)}"
    assert file_fingerprint(tmp_path / "a.bin", large=5) == expected
    assert file_fingerprint(tmp_path / "a.bin", large=size) == f"a.bin {beginning(data)}"


@pytest.mark.skipif(sys.platform == "win32", reason="Unix's pipes and devices")
def test_what_may_never_end_has_no_fingerprint(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(FileNotFoundError, match="not a file"):
            file_fingerprint(path)
