"""The average of checkpoints, and which checkpoints have none."""

import sys

import pytest
import torch

from config import LlamaConfig
from minllama.checkpoints import average, pt
from minllama.checkpoints.layout import EMBEDDING, HEAD, build_checkpoint, shapes_of
from minllama.common.errors import InputError
from minllama.common.program import run_script


def small_config(vocab_size=16) -> LlamaConfig:
    return LlamaConfig(vocab_size, 8, n_layers=1, n_heads=2, n_kv_heads=1, causal=True)


@pytest.fixture
def write(tmp_path, tokenizer_path):
    """Writes a checkpoint of one value everywhere, with a tokenizer beside it."""

    def write(name, value, vocab_size=16, tokenizer=None, dtype=torch.float16):
        path = tmp_path / name / "model.pt"
        path.parent.mkdir()
        config = small_config(vocab_size)
        tensors = {n: torch.full(s, value, dtype=dtype) for n, s in shapes_of(config).items()}
        pt.save(build_checkpoint(config, tensors, path), path)
        pieces = tokenizer or tokenizer_path.read_bytes()
        path.with_name("tokenizer.model").write_bytes(pieces)
        return str(path)

    return write


def run(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["average", *map(str, flags)])
    run_script(average.main)


@pytest.mark.parametrize(("weights", "expected"), [([], 2.0), (["--weights", 3, 1], 1.5)])
def test_the_average_has_the_weights_asked_for(write, tmp_path, monkeypatch, weights, expected):
    out = tmp_path / "out/model.pt"
    out.parent.mkdir()
    run(monkeypatch, write("a", 1.0), write("b", 3.0, dtype=torch.float32), "--out", out, *weights)
    averaged = pt.load(out)
    assert averaged.config.causal and averaged.config.dim == 8
    for tensor in averaged.tensors.values():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, torch.full_like(tensor, expected))
    assert averaged.tensors[EMBEDDING] is averaged.tensors[HEAD]
    copied = out.with_name("tokenizer.model").read_bytes()
    assert copied == (tmp_path / "a/tokenizer.model").read_bytes()


def test_each_tensor_has_its_own_mean():
    """Head and embedding differ here."""
    shares = [0.5, 0.2, 0.3]
    draws = [{n: torch.randn(s) for n, s in shapes_of(small_config()).items()} for _ in shares]
    checkpoints = [build_checkpoint(small_config(), tensors, "x") for tensors in draws]
    for name, tensor in average.average(checkpoints, shares).tensors.items():
        expected = 0.5 * draws[0][name] + 0.2 * draws[1][name] + 0.3 * draws[2][name]
        torch.testing.assert_close(tensor, expected)
    half = {name: tensor.half() for name, tensor in draws[0].items()}
    checkpoints[0] = build_checkpoint(small_config(), half, "x")
    checkpoints[1].tensors["norm.weight"][0] = 1e6
    with pytest.raises(InputError, match=r"norm.weight .* torch.float16"):
        average.average(checkpoints, shares)


REFUSED = [
    ({"vocab_size": 17}, [], "vocab_size is 17"),
    ({"tokenizer": b"others"}, [], "tokenizer.model"),
    ({}, ["--weights", "1"], "--weights"),
    ({}, ["--weights", "2", "-1"], "--weights"),
    ({}, ["--out", "b/model.pt"], "would overwrite"),
]


@pytest.mark.parametrize(("other", "flags", "word"), REFUSED)
def test_what_has_no_average_is_refused(write, tmp_path, monkeypatch, capsys, other, flags, word):
    monkeypatch.chdir(tmp_path)
    paths = write("a", 1.0), write("b", 3.0, **other)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *paths, "--out", "model.pt", *flags)
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
