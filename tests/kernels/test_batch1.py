"""Batch-1 decoding, in few operations and compiled, against the plain model."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_llama

from llama import Llama, load_pretrained
from minllama.inference.cache import KVCache
from minllama.inference.decoding import decode
from minllama.inference.sampling import Sampling
from minllama.kernels import quantize
from minllama.kernels.batch1 import Batch1Llama
from minllama.kernels.cpu import accelerate
from minllama.kernels.quantize import DTYPES, prepare_for_decoding
from tokenizer import Tokenizer

GREEDY = Sampling(0.0)


def make_batch1(llama: Llama, dtype: str) -> Batch1Llama:
    return Batch1Llama(prepare_for_decoding(llama, dtype))


@pytest.fixture(params=["few operations", "compiled"])
def form(request) -> Callable[[Llama, str], Batch1Llama]:
    """Converts a model for batch-1 decoding in some precision."""
    if request.param == "few operations":
        return make_batch1
    return pytest.importorskip("minllama.kernels.compiled", exc_type=ImportError).CompiledLlama


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
def test_logits_are_the_plain_ones_at_every_position(form, shape):
    plain = make_llama(causal=True, max_seq_len=40, **shape)
    fast = form(make_llama(causal=True, max_seq_len=40, **shape), "float32")
    ids = torch.randint(4, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, _ = plain(ids, targets=ids)
        cache = KVCache(plain, 1, 40)
        prompt = fast.next_logits(ids[:, :5], cache)
        assert relative_error(prompt[0], expected[0, 4]) < 1e-5
        for i in range(5, 40):
            logits = fast.next_logits(ids[:, i : i + 1], cache)
            assert relative_error(logits[0], expected[0, i]) < 1e-5
        assert cache.lengths == [40]


@pytest.mark.parametrize("max_numel", [quantize.MAX_NUMEL_TWICE, 0], ids=["small", "large"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.02), ("int8", 0.03)]
)
def test_all_precisions_and_kernels_are_near(form, dtype, bound, max_numel, monkeypatch):
    monkeypatch.setattr(quantize, "MAX_NUMEL_TWICE", max_numel)
    plain = make_llama(causal=True)
    fast = form(make_llama(causal=True), dtype)
    ids = torch.randint(4, 300, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, _ = plain(ids, targets=ids)
        cache = KVCache(plain, 1, 30)
        for i in range(30):
            logits = fast.next_logits(ids[:, i : i + 1], cache)
            assert relative_error(logits[0].float(), expected[0, i]) < bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_batch_decode_as_alone(form, dtype):
    """Three prompts, of which one goes on alone at the end."""
    prompts = [[1, 5, 9], [1], [1, 7, 7, 7, 7, 7, 7]]
    fast = form(make_llama(causal=True), dtype)
    stops = {(0, 3 + 3), (2, 7 + 5)}  # row and length
    steps = list(decode(fast, prompts, 12, GREEDY, (), lambda row, ids: (row, len(ids)) in stops))
    assert [sum(ids[row] is not None for ids in steps) for row in range(3)] == [3, 12, 5]
    for row, prompt in enumerate(prompts):
        together = [ids[row] for ids in steps if ids[row] is not None]
        alone = [token for (token,) in decode(fast, [prompt], 12, GREEDY, ())]
        n = len(together) if dtype == "float32" else 1  # rounding may change a later token
        assert together[:n] == alone[:n]


@pytest.fixture(params=["stories260K", "demo"])
def trained(request) -> tuple[Path, Path]:
    """The paths of a checkpoint and its tokenizer."""
    if request.param == "demo":
        return ROOT / "data/demo/model.pt", ROOT / "data/demo/tokenizer.model"
    folder = request.getfixturevalue("real_assets")("stories260K")
    return folder / "stories260K.pt", folder / "tok512.model"


def load(path: Path) -> Llama:
    return load_pretrained(path, causal=True, init_weights=False).eval()


def write_1000_tokens(llama: Llama | Batch1Llama) -> list[int]:
    ids = []
    for prompt in ([1], [1, 300]):
        steps = decode(llama, [prompt], llama.config.max_seq_len - 2, GREEDY, ())
        ids += [token for (token,) in steps]
    return ids


@functools.cache
def plain_tokens(checkpoint: Path) -> list[int]:
    llama = load(checkpoint)
    accelerate(llama)
    return write_1000_tokens(llama)


def test_1000_tokens_are_those_of_the_plain_model(form, trained):
    checkpoint, _ = trained
    assert len(plain_tokens(checkpoint)) >= 1000
    assert write_1000_tokens(form(load(checkpoint), "float32")) == plain_tokens(checkpoint)


def bits_per_byte(logits: list[torch.Tensor], ids: list[list[int]], texts: list[str]) -> float:
    nats = sum(
        F.cross_entropy(scores.float(), torch.tensor(row[1:]), reduction="sum").item()
        for scores, row in zip(logits, ids, strict=True)
    )
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@torch.inference_mode()
def read_by_token(llama: Batch1Llama, ids: list[int]) -> torch.Tensor:
    cache = KVCache(llama, 1, len(ids))
    return torch.cat([llama.next_logits(torch.tensor([[i]]), cache).clone() for i in ids[:-1]])


@torch.inference_mode()
def test_bits_per_byte_in_lower_precision(form, trained, real_assets):
    checkpoint, tokenizer_path = trained
    stories = (real_assets("tinystories") / "dev.txt").read_text().split("<|endoftext|>")
    texts = [story.strip()[:600] for story in stories[:12]]
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    ids = [tokenizer.encode(text, bos=True, eos=False) for text in texts]
    plain = load(checkpoint)
    logits = [plain(torch.tensor([row[:-1]]), targets=True)[0][0] for row in ids]
    expected = bits_per_byte(logits, ids, texts)
    assert 0.3 < expected < 1.2
    for dtype, bound in (("bfloat16", 0.001), ("int8", 0.005)):
        llama = form(load(checkpoint), dtype)
        logits = [read_by_token(llama, row) for row in ids]
        assert abs(bits_per_byte(logits, ids, texts) - expected) < bound
