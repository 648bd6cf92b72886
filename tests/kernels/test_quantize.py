"""Packed and low-precision weights against plain products, and their cost in quality."""

import math

import pytest
import torch
from conftest import make_llama

from experiments.bits_per_byte import bits_per_byte, read_stories
from llama import load_pretrained
from minllama.inference.cache import KVCache
from minllama.inference.decoding import decode
from minllama.inference.sampling import Sampling
from minllama.kernels.quantize import (
    DTYPES,
    Int8Product,
    packed_bfloat16,
    packed_float,
    packed_int8,
    prepare_for_decoding,
    takes_one_row,
)
from tokenizer import Tokenizer

SHAPES = [(64, 96), (512, 64), (24, 172), (33, 50)]  # the last two suit not every kernel


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_rows", [1, 2, 7, 40])
def test_products_equal_plain_ones(shape, n_rows):
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(n_rows, 1, shape[1])
    exact = x.double() @ weight.double().T
    for linear, tolerance in (
        (packed_float(weight), 1e-6),
        (packed_bfloat16(weight), 0.015),
        (packed_int8(weight), 0.02),
    ):
        y = linear(x)
        assert y.shape == exact.shape
        assert (y - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_has_a_scale_for_each_output_channel(shape):
    """The product is that of the weights rounded to 127 steps of their own row's magnitude."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    step = weight.double().abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight / step).round() * step
    x = torch.randn(1, shape[1])
    exact = x.double() @ rounded.T
    tolerance = 1e-5 if takes_one_row(weight) else 0.01  # float32 or bfloat16 activations
    error = (packed_int8(weight)(x) - exact).abs() / (x.double().abs() @ rounded.abs().T)
    assert error.max() < tolerance


def test_zero_rows_stay_zero():
    y = packed_int8(torch.zeros(8, 32))(torch.randn(1, 32))
    assert torch.equal(y, torch.zeros(1, 8))


@pytest.mark.parametrize("n_rows", [Int8Product.MAX_ROWS, Int8Product.MAX_ROWS + 1])
def test_int8_kernels_agree(n_rows):
    torch.manual_seed(0)
    linear, x = packed_int8(torch.randn(64, 96)), torch.randn(n_rows, 96)
    rows = torch.cat([linear.several_rows(row[None]) for row in x])
    assert (linear(x) - rows).abs().max() < 0.01 * rows.abs().max()


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_packed_float32_computes_the_same(n_kv_heads):
    plain = make_llama(causal=True, n_kv_heads=n_kv_heads)
    packed = prepare_for_decoding(make_llama(causal=True, n_kv_heads=n_kv_heads))
    tokens = torch.randint(4, 320, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for part in (tokens, tokens[:1, :1]):
            ours, theirs = packed(part, targets=part)[0], plain(part, targets=part)[0]
            assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    prompts = [[1, 5, 9], [1]]
    assert list(decode(packed, prompts, 20, Sampling(0.0))) == list(
        decode(plain, prompts, 20, Sampling(0.0))
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_of_different_lengths_decode_in_any_precision(dtype):
    llama = prepare_for_decoding(make_llama(causal=True), dtype)
    prompts = [[1, 5, 9], [1], [1, 7, 7, 7, 7, 7, 7]]
    steps = list(decode(llama, prompts, 12, Sampling(0.0)))
    for row, prompt in enumerate(prompts):
        first = next(decode(llama, [prompt], 1, Sampling(0.0)))[0]
        assert steps[0][row] == first


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_embedding_stay_float32(dtype):
    llama = prepare_for_decoding(make_llama(causal=True), dtype)
    names = {name for name, _ in llama.named_parameters()}
    assert names == {
        "tok_embeddings.weight",
        "norm.weight",
        *(f"layers.{i}.{norm}.weight" for i in (0, 1) for norm in ("attention_norm", "ffn_norm")),
    }
    assert {p.dtype for p in llama.parameters()} == {torch.float32}
    plain = make_llama(causal=True)
    assert torch.equal(llama.tok_embeddings.weight, plain.tok_embeddings.weight)


def test_lower_precision_costs_little_quality(real_assets):
    folder = real_assets("stories260K")
    tokenizer = Tokenizer(tokenizer_model=folder / "tok512.model")
    stories = read_stories(real_assets("tinystories") / "dev.txt")
    score = {}
    for dtype in DTYPES:
        llama = prepare_for_decoding(
            load_pretrained(folder / "stories260K.pt", causal=True).eval(), dtype
        )
        score[dtype] = bits_per_byte(llama, tokenizer, stories)
    assert score["float32"] == pytest.approx(0.918, abs=0.0015)
    assert abs(score["bfloat16"] - score["float32"]) < 0.005
    assert abs(score["int8"] - score["float32"]) < 0.01
    # They do use their weights, or the numbers would be equal.
    assert len(set(score.values())) == 3


def test_one_token_per_step_costs_as_little(real_assets):
    """The same through the cache, with the one-row kernels, on the first of the stories."""
    folder = real_assets("stories260K")
    tokenizer = Tokenizer(tokenizer_model=folder / "tok512.model")
    stories = read_stories(real_assets("tinystories") / "dev.txt")[:5]
    score = {}
    for dtype in DTYPES:
        llama = prepare_for_decoding(
            load_pretrained(folder / "stories260K.pt", causal=True).eval(), dtype
        )
        nats = 0.0
        for story in stories:
            ids = torch.tensor([tokenizer.encode(story, bos=True, eos=False)])
            cache = KVCache(llama.config, 1, ids.shape[1])
            with torch.inference_mode():
                hidden = [llama.hidden_states(part, cache=cache) for part in ids.split(1, dim=1)]
                logits = torch.cat([llama.output(state) for state in hidden[:-1]], dim=1)
            nats += torch.nn.functional.cross_entropy(
                logits[0].float(), ids[0, 1:], reduction="sum"
            ).item()
        score[dtype] = nats / math.log(2) / sum(len(story.encode()) for story in stories)
    assert abs(score["bfloat16"] - score["float32"]) < 0.005
    assert abs(score["int8"] - score["float32"]) < 0.01


def test_int8_decodes_a_story_token_by_token(real_assets):
    """The one-row kernels, through the cache, over hundreds of tokens."""
    folder = real_assets("stories260K")
    llama = prepare_for_decoding(
        load_pretrained(folder / "stories260K.pt", causal=True).eval(), "int8"
    )
    tokenizer = Tokenizer(tokenizer_model=folder / "tok512.model")
    ids = [token for (token,) in decode(llama, [[tokenizer.bos_id]], 300, Sampling(0.0))]
    assert tokenizer.decode(ids).startswith("Once upon a time, there was a little girl named Lily.")
