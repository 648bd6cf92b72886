"""Texts in and texts out: streaming, stops, batches, compiled decoding, threads."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from minllama.common.flags import DEMO
from minllama.inference import generator as generator_module
from minllama.inference.generator import GenerationBatch, TextGenerator
from minllama.inference.sampling import Sampling
from minllama.kernels.quantize import DTYPES

GREEDY = Sampling(0.0)


class ScriptedLlama:
    """Predicts given ids, one after the other, whatever the context is."""

    config = SimpleNamespace(causal=False, max_seq_len=1000)
    tok_embeddings = torch.nn.Embedding(1, 1)

    def __init__(self, ids):
        self.ids = iter(ids)

    def hidden_states(self, tokens, positions):
        return torch.zeros(1, 1, 1)

    def output(self, hidden):
        return torch.eye(320)[[next(self.ids)]]


def stream(tokenizer, ids, prompt="", stop=()):
    """Continue a prompt by ids; the stable prefixes as they came, and the text in the end."""
    generator = SimpleNamespace(llama=ScriptedLlama(ids), tokenizer=tokenizer)
    batch = GenerationBatch(generator, [prompt], GREEDY, len(ids), stop)
    prefixes = [batch.stable_prefix(0) for _ in batch]
    assert all(later.startswith(prefix) for prefix, later in itertools.pairwise(prefixes))
    assert batch.text(0).startswith(prefixes[-1])
    return prefixes, batch.text(0)


def test_characters_of_several_bytes_appear_whole(tokenizer):
    text = "naïve 映画 🎬 fin"
    prefixes, whole = stream(tokenizer, tokenizer.encode(text, bos=False, eos=False))
    assert prefixes[-1] == whole == text
    assert len(set(prefixes)) > 8  # it did come piece by piece
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(prefixes)


def test_bytes_that_are_no_character_appear_at_the_end(tokenizer):
    ids = tokenizer.encode("a", bos=False, eos=False)
    prefixes, whole = stream(tokenizer, [*ids, tokenizer.sp_model.piece_to_id("<0xE4>")])
    assert (prefixes[-1], whole) == ("a", "a\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["d e"], "a b c "),
        (["zz", "f", "c d"], "a b "),
        (["b c"], "a b c d e f"),  # it begins in the prompt
        (["f g"], "a b c d e f"),
    ],
)
def test_a_text_ends_before_its_stop_and_never_shows_a_part_of_it(tokenizer, stop, expected):
    ids = tokenizer.encode("c d e f", bos=False, eos=False)
    prefixes, whole = stream(tokenizer, ids, "a b", stop)
    assert whole == expected
    assert all(whole.startswith(prefix) for prefix in prefixes)


def test_special_tokens_in_a_prompt_are_plain_text(project):
    generator = TextGenerator("model.pt")
    text = "<s>a warm</s> film"
    batch = GenerationBatch(generator, [text], GREEDY, 0)
    assert batch.text(0) == text
    assert [token for token in batch.rows[0] if token in (1, 2)] == [1]


@pytest.mark.parametrize("causal", [True, False])
def test_prompts_of_any_lengths_are_continued_as_alone(project, causal):
    generator = TextGenerator(project.path / "model.pt", causal=causal)
    prompts = ["a warm", "the plot is thin and the jokes are", "neither"]
    alone = [generator.complete([prompt], GREEDY, 10)[0] for prompt in prompts]
    assert generator.complete(prompts, GREEDY, 10) == alone
    assert all(text.startswith(prompt) for text, prompt in zip(alone, prompts, strict=True))
    stops = [text[len(prompt) + 4 :][:2] for text, prompt in zip(alone, prompts, strict=True)]
    stopped = generator.complete(prompts, GREEDY, 10, stops)
    for text, whole, prompt in zip(stopped, alone, prompts, strict=True):
        ends = [whole.find(stop, len(prompt)) for stop in stops]
        assert text == whole[: min(end for end in ends if end >= 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpoint", ["model.pt", DEMO / "model.pt"])  # float32 and float16
def test_compiled_decoding_writes_the_same_texts(project, checkpoint, dtype):
    pytest.importorskip("numba")
    plain, compiled = (
        TextGenerator(checkpoint, causal=True, dtype=dtype, compile=compile)
        for compile in (False, True)
    )
    assert type(compiled.llama) is not type(plain.llama)
    assert compiled.complete(["a warm"], GREEDY, 12) == plain.complete(["a warm"], GREEDY, 12)


@pytest.mark.parametrize(
    ("min_bytes", "environment", "expected"),
    [(1 << 30, {}, [1]), (1, {}, []), (1 << 30, {"OMP_NUM_THREADS": "2"}, [])],
    ids=["small", "large", "set by the user"],
)
def test_a_small_model_takes_one_thread(project, monkeypatch, min_bytes, environment, expected):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(generator_module, "MIN_BYTES_FOR_THREADS", min_bytes)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    TextGenerator("model.pt", causal=True, dtype="int8", limit_threads=True)
    assert threads == expected
