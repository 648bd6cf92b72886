"""The steps for one row, in few operations and compiled, against the plain model."""

import itertools
import math

import pytest
import torch
from conftest import ROOT, make_llama

from llama import Llama, load_pretrained
from minllama.inference.cache import KVCache
from minllama.inference.decoding import decode
from minllama.inference.sampling import Sampling
from minllama.kernels import quantize as packing
from minllama.kernels.batch1 import Batch1Llama
from minllama.kernels.quantize import DTYPES, PackedLlama, prepare_for_decoding
from tokenizer import Tokenizer


@pytest.fixture(params=["few operations", "compiled"])
def one_row(request) -> type[PackedLlama]:
    if request.param == "few operations":
        return Batch1Llama
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
def test_logits_are_the_plain_ones_at_every_position(one_row, shape):
    plain = make_llama(causal=True, max_seq_len=40, **shape)
    fast = one_row(make_llama(causal=True, max_seq_len=40, **shape), "float32")
    ids = torch.randint(4, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, _ = plain(ids, targets=ids)
        cache = KVCache(plain.config, 1, 40)
        prompt = fast.next_logits(ids[:, :5], cache)
        assert relative_error(prompt[0], expected[0, 4]) < 1e-5
        for i in range(5, 40):
            logits = fast.next_logits(ids[:, i : i + 1], cache)
            assert relative_error(logits[0], expected[0, i]) < 1e-5
        assert cache.lengths == [40]


@pytest.mark.parametrize("small", [packing.SMALL, 0], ids=["small", "large"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.02), ("int8", 0.03)]
)
def test_all_precisions_and_kernels_are_near(one_row, dtype, bound, small, monkeypatch):
    monkeypatch.setattr(packing, "SMALL", small)
    plain = make_llama(causal=True)
    fast = one_row(make_llama(causal=True), dtype)
    ids = torch.randint(4, 300, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, _ = plain(ids, targets=ids)
        cache = KVCache(plain.config, 1, 30)
        for i in range(30):
            logits = fast.next_logits(ids[:, i : i + 1], cache)
            assert relative_error(logits[0].float(), expected[0, i]) < bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_and_rows_that_end_are_as_without_it(one_row, dtype):
    """Three rows, of which one goes on alone at the end."""
    prompts = [[1, 5, 9], [1], [1, 7, 7, 7, 7, 7, 7]]
    fast = one_row(make_llama(causal=True), dtype)
    stops = {(0, 3 + 3), (2, 7 + 5)}
    steps = list(
        decode(fast, prompts, 12, Sampling(0.0), (), lambda row, ids: (row, len(ids)) in stops)
    )
    assert [row is None for row in steps[-1]] == [True, False, True]
    if dtype == "float32":
        alone = decode(prepare_for_decoding(make_llama(causal=True)), [[1]], 12, Sampling(0.0), ())
        assert [row[1] for row in steps] == [row for (row,) in alone]


@pytest.fixture(params=["stories260K", "demo"])
def trained(request) -> tuple[str, str]:
    """The paths of a checkpoint and its tokenizer."""
    if request.param == "demo":
        return ROOT / "data/demo/model.pt", ROOT / "data/demo/tokenizer.model"
    folder = request.getfixturevalue("real_assets")("stories260K")
    return folder / "stories260K.pt", folder / "tok512.model"


def load(path: str) -> Llama:
    return load_pretrained(path, causal=True, init_weights=False).eval()


def test_1000_tokens_are_those_of_the_packed_modules(one_row, trained):
    texts = []
    for llama in (prepare_for_decoding(load(trained[0])), one_row(load(trained[0]), "float32")):
        n = llama.config.max_seq_len - 1
        ids = []
        for prompt in ([1], [1, 300]):  # 1000 tokens together
            ids += [token for (token,) in decode(llama, [prompt], n - 1, Sampling(0.0), ())]
        texts.append(ids)
    assert len(texts[0]) >= 1000 and texts[0] == texts[1]


@torch.inference_mode()
def bits_per_byte(llama: PackedLlama, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Of texts that are read token by token, as they are decoded."""
    nats = 0.0
    for text in texts:
        ids = tokenizer.encode(text, bos=True, eos=False)
        cache = KVCache(llama.config, 1, len(ids))
        for token, target in itertools.pairwise(ids):
            logits = llama.next_logits(torch.tensor([[token]]), cache)
            nats -= logits[0].float().log_softmax(0)[target].item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def test_bits_per_byte_in_lower_precision(one_row, trained, real_assets):
    stories = (real_assets("tinystories") / "dev.txt").read_text().split("<|endoftext|>")
    texts = [story.strip()[:600] for story in stories[:12]]
    tokenizer = Tokenizer(tokenizer_model=trained[1])
    plain, bfloat16, int8 = (
        bits_per_byte(one_row(load(trained[0]), dtype), tokenizer, texts) for dtype in DTYPES
    )
    assert abs(bfloat16 - plain) < 0.001
    assert abs(int8 - plain) < 0.005
    assert 0.3 < plain < 1.2
