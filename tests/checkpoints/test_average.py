"""The average of checkpoints: what it is, and what is refused."""

import sys

import pytest
import torch

from config import LlamaConfig
from minllama.checkpoints import average, pt
from minllama.checkpoints.layout import EMBEDDING, HEAD, checked, shapes_of
from minllama.common.errors import InputError
from minllama.common.program import run_script

SHAPE = {
    "dim": 8,
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "multiple_of": 4,
    "max_seq_len": 16,
}


@pytest.fixture
def write(tmp_path):
    """Write a checkpoint of one value everywhere, and a tokenizer beside it."""

    def write(name, value, vocab_size=16, tokenizer=b"pieces", dtype=torch.float16):
        path = tmp_path / name / "model.pt"
        path.parent.mkdir()
        config = LlamaConfig(vocab_size=vocab_size, causal=True, **SHAPE)
        tensors = {n: torch.full(s, value, dtype=dtype) for n, s in shapes_of(config).items()}
        pt.save(checked(config, tensors, path), path)
        path.with_name("tokenizer.model").write_bytes(tokenizer)
        return str(path)

    return write


def run(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["average", *map(str, flags)])
    run_script(average.main)


@pytest.mark.parametrize(("weights", "expected"), [([], 2.0), (["--weights", 3, 1], 1.5)])
def test_the_average_has_the_shares_asked_for(write, tmp_path, monkeypatch, weights, expected):
    out = tmp_path / "out/model.pt"
    out.parent.mkdir()
    run(monkeypatch, write("a", 1.0), write("b", 3.0, dtype=torch.float32), "--out", out, *weights)
    made = pt.load(out)
    assert made.config.causal and made.config.dim == 8
    for tensor in made.tensors.values():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, torch.full_like(tensor, expected))
    assert made.tensors[EMBEDDING] is made.tensors[HEAD]
    assert out.with_name("tokenizer.model").read_bytes() == b"pieces"


def test_each_tensor_has_its_own_mean():
    """Head and embedding differ here."""
    config = LlamaConfig(vocab_size=16, causal=True, **SHAPE)
    draws = [{name: torch.randn(s) for name, s in shapes_of(config).items()} for _ in range(3)]
    parts = [checked(LlamaConfig(vocab_size=16, causal=True, **SHAPE), d, "x") for d in draws]
    made = average.average(parts, [0.5, 0.2, 0.3])
    for name, tensor in made.tensors.items():
        expected = 0.5 * draws[0][name] + 0.2 * draws[1][name] + 0.3 * draws[2][name]
        torch.testing.assert_close(tensor, expected)
    half = {name: tensor.half() for name, tensor in draws[0].items()}
    parts[0] = checked(LlamaConfig(vocab_size=16, causal=True, **SHAPE), half, "x")
    parts[1].tensors["norm.weight"][0] = 1e6
    with pytest.raises(InputError, match=r"x: norm.weight has values too large for torch.float16"):
        average.average(parts, [0.5, 0.2, 0.3])


@pytest.mark.parametrize(
    ("other", "flags", "message"),
    [
        ({"vocab_size": 17}, [], "its vocab_size is 17, "),
        ({"tokenizer": b"others"}, [], "another tokenizer than"),
        ({}, ["--weights", "1"], "--weights: 1 for 2 checkpoints"),
        ({}, ["--weights", "2", "-1"], "--weights: need numbers of 0 or more"),
    ],
)
def test_what_has_no_average_is_refused(
    write, tmp_path, monkeypatch, capsys, other, flags, message
):
    paths = write("a", 1.0), write("b", 3.0, **other)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *paths, "--out", tmp_path / "model.pt", *flags)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model.pt").exists()


def test_no_checkpoint_is_overwritten(write, monkeypatch, capsys):
    paths = write("a", 1.0), write("b", 3.0)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *paths, "--out", paths[1])
    assert torch.equal(pt.load(paths[1]).tensors["norm.weight"], torch.full((8,), 3.0).half())
