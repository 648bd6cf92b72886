"""The compiled step against the plain model."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_llama

from inference import decoding
from inference.decoding import decode
from inference.packing import DTYPES, pack
from inference.sampling import Sampling

pytest.importorskip("numba")

from inference.cache import KVCache
from inference.compiled import CompiledLlama


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


SHAPES = [
    {},
    {"n_kv_heads": 1},
    {"n_kv_heads": 2, "tie_embeddings": False},
    {"dim": 36, "n_heads": 6, "n_kv_heads": 3, "hidden_dim": 50},  # no multiples of a vector
    {"n_layers": 3, "rope_theta": 500.0, "layer_norm_eps": 1e-2},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_plain_ones_at_every_position(shape):
    plain = make_llama(causal=True, max_seq_len=40, **shape)
    compiled = CompiledLlama(make_llama(causal=True, max_seq_len=40, **shape), "float32")
    ids = torch.randint(4, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, _ = plain(ids, targets=ids)
        cache = KVCache(plain.config, 1, 40)
        prompt = compiled.next_logits(ids[:, :5], cache)
        assert relative_error(prompt[0], expected[0, 4]) < 1e-5
        for i in range(5, 40):
            logits = compiled.next_logits(ids[:, i : i + 1], cache)
            assert relative_error(logits[0], expected[0, i]) < 1e-5
        assert cache.lengths == [40]


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.02), ("int8", 0.03)])
def test_lower_precision_is_near(dtype, bound):
    plain = make_llama(causal=True)
    compiled = CompiledLlama(make_llama(causal=True), dtype)
    ids = torch.randint(4, 300, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, _ = plain(ids, targets=ids)
        cache = KVCache(plain.config, 1, 30)
        for i in range(30):
            logits = compiled.next_logits(ids[:, i : i + 1], cache)
            assert relative_error(logits[0], expected[0, i]) < bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_and_rows_that_end_are_as_without_it(dtype, monkeypatch):
    """Three rows, of which one goes on alone at the end."""
    monkeypatch.setattr(decoding, "STOP_IDS", ())
    prompts = [[1, 5, 9], [1], [1, 7, 7, 7, 7, 7, 7]]
    ended, steps = set(), []
    compiled = CompiledLlama(make_llama(causal=True), dtype)
    for step in decode(compiled, prompts, 12, Sampling(0.0), (), ended):
        steps.append(step)
        ended.update({3: [0], 5: [2]}.get(len(steps), []))
    assert [row is None for row in steps[-1]] == [True, False, True]
    if dtype == "float32":
        alone = decode(pack(make_llama(causal=True)), [[1]], 12, Sampling(0.0), ())
        assert [row[1] for row in steps] == [row for (row,) in alone]


@pytest.mark.parametrize("name", ["stories260K/stories260K.pt", "data/demo/model.pt"])
def test_1000_tokens_are_those_of_the_eager_step(name, request):
    if name.startswith("data"):
        path = ROOT / name
    else:
        path = request.getfixturevalue("real_assets")("stories260K") / "stories260K.pt"
    from llama import load_pretrained

    models = [load_pretrained(path, causal=True, init_weights=False).eval() for _ in range(2)]
    texts = []
    for llama in (pack(models[0]), CompiledLlama(models[1], "float32")):
        n = llama.config.max_seq_len - 1
        ids = []
        for prompt in ([1], [1, 300]):  # 1000 tokens together
            ids += [token for (token,) in decode(llama, [prompt], n - 1, Sampling(0.0), ())]
        texts.append(ids)
    assert len(texts[0]) >= 1000 and texts[0] == texts[1]


RUN = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from conftest import make_llama
from inference.compiled import CompiledLlama
from inference.decoding import decode
from inference.sampling import Sampling
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
