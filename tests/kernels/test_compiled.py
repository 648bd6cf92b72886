"""The compiled step's cache on the disk. What it computes is tested in `test_batch1.py`."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("numba")

RUN = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from conftest import make_llama
from minllama.kernels.compiled import CompiledLlama
from minllama.inference.decoding import decode
from minllama.inference.sampling import Sampling
llama = CompiledLlama(make_llama(causal=True), "float32")
print([token for (token,) in decode(llama, [[1]], 5, Sampling(0.0), ())])
"""


def run(**environment: str) -> str:
    code = RUN.format(root=str(ROOT), tests=str(ROOT / "tests"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_cache_that_is_damaged_or_cannot_be_written_costs_time_only(tmp_path):
    cache = tmp_path / "cache"
    expected = run(NUMBA_CACHE_DIR=str(cache))
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:-20])
    assert run(NUMBA_CACHE_DIR=str(cache)) == expected
    (tmp_path / "file").touch()
    assert run(NUMBA_CACHE_DIR=str(tmp_path / "file" / "x")) == expected
