"""The forward pass, generation and initialisation, against independent computations."""

import math

import numpy as np
import pytest
import torch
from conftest import MODEL_ARGS, make_llama
from reference_math import llama_forward

from config import LlamaConfig
from experiments.bits_per_byte import bits_per_byte, read_stories
from llama import Attention, FeedForward, Llama, RMSNorm, load_pretrained
from minllama.inference.decoding import decode
from minllama.inference.sampling import Sampling
from sanity_check import TOKENS
from tokenizer import Tokenizer


def relative_error(ours: torch.Tensor, theirs: np.ndarray) -> float:
    return float(np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_forward_equals_float64_numpy(n_kv_heads, causal):
    llama = make_llama(n_kv_heads=n_kv_heads, causal=causal)
    tokens = torch.randint(0, 320, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits, hidden = llama(tokens, targets=tokens)
        last_logits, _ = llama(tokens)
    args = MODEL_ARGS | {"n_kv_heads": n_kv_heads, "causal": causal}
    weights = {name: tensor.numpy() for name, tensor in llama.state_dict().items()}
    expected_logits, expected_hidden = llama_forward(weights, tokens.numpy(), args)
    assert relative_error(logits, expected_logits) < 1e-5
    assert relative_error(hidden, expected_hidden) < 1e-5
    assert last_logits.shape == (3, 1, 320)
    assert relative_error(last_logits, expected_logits[:, -1:]) < 1e-5


def test_attention_is_unmasked_by_default_as_the_official_states_demand(assets):
    """Rows that share only their first token have different states there."""
    official = torch.load(assets / "sanity_check.data", weights_only=True)["hidden_states"]
    assert TOKENS[0][0] == TOKENS[1][0]
    assert (official[0, 0] - official[1, 0]).abs().max() > 10

    tokens = TOKENS % MODEL_ARGS["vocab_size"]
    with torch.inference_mode():
        unmasked = make_llama().hidden_states(tokens)
        causal = make_llama(causal=True).hidden_states(tokens)
    assert (unmasked[0, 0] - unmasked[1, 0]).abs().max() > 0.1
    assert torch.allclose(causal[0, 0], causal[1, 0], atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_chosen_positions_have_the_states_and_gradients_of_the_whole_pass(causal):
    llama = make_llama(causal=causal)
    tokens = torch.randint(0, 320, (3, 9), generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[8, 0], [3, 4], [0, 0]])
    gradients = []
    for whole in (True, False):
        llama.zero_grad()
        if whole:
            hidden = llama.hidden_states(tokens)
            hidden = torch.stack([row[p] for row, p in zip(hidden, positions, strict=True)])
        else:
            hidden = llama.hidden_states(tokens, positions)
        hidden.square().sum().backward()
        gradients.append([hidden.detach(), *(p.grad for p in llama.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() < 1e-5 * a.abs().max()


def test_stories260k_tells_its_known_story(real_assets):
    folder = real_assets("stories260K")
    llama = load_pretrained(folder / "stories260K.pt", causal=True).eval()
    tokenizer = Tokenizer(tokenizer_model=folder / "tok512.model")
    ids = llama.generate(torch.tensor([[tokenizer.bos_id]]), 230, temperature=0.0)
    assert tokenizer.decode(ids[0].tolist()).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
        "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. "
        'She said, "I want to play with your ball, but I can\'t find it."\n'
        "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what "
        'to do."'
    )


def test_stories260k_has_its_known_bits_per_byte(real_assets):
    """0.918 on TinyStories' held-out stories, with the mask that it was trained with."""
    folder = real_assets("stories260K")
    tokenizer = Tokenizer(tokenizer_model=folder / "tok512.model")
    stories = read_stories(real_assets("tinystories") / "dev.txt")
    assert len(stories) == 100
    causal, unmasked = (
        bits_per_byte(load_pretrained(folder / "stories260K.pt", causal=causal), tokenizer, stories)
        for causal in (True, False)
    )
    assert causal == pytest.approx(0.918, abs=0.0015)
    assert unmasked > causal + 0.5


@pytest.mark.parametrize(("causal", "length"), [(False, 22), (True, 16)])
def test_generation_is_greedy_over_the_context(causal, length):
    """A causal model stops when the context is full; without a mask the context is cropped."""
    llama = make_llama(max_seq_len=16, causal=causal)
    prompt = torch.randint(4, 320, (2, 5), generator=torch.Generator().manual_seed(2))
    ids = llama.generate(prompt, 17, temperature=0.0, stop_ids=())
    assert ids.shape == (2, length)
    assert torch.equal(ids[:, :5], prompt)
    for position in range(5, length):
        with torch.inference_mode():
            logits, _ = llama(ids[:, max(0, position - 16) : position])
        assert torch.equal(ids[:, position], logits[:, -1].argmax(dim=-1))


def test_sampling_draws_from_the_tempered_softmax_on_the_global_generator():
    llama = make_llama(scale=1.0)
    prompt = torch.tensor([[1, 40, 50]]).repeat(4000, 1)
    torch.manual_seed(5)
    drawn = llama.generate(prompt, 1, temperature=0.1)[:, -1]
    torch.manual_seed(5)
    assert torch.equal(llama.generate(prompt, 1, temperature=0.1)[:, -1], drawn)
    with torch.inference_mode():
        logits, _ = llama(prompt[:1])
    expected = torch.softmax(logits[0, 0].double() / 0.1, dim=-1)
    observed = torch.bincount(drawn, minlength=320) / 4000
    # Four standard deviations of a binomial proportion.
    assert ((observed - expected).abs() < 4 * (expected / 4000).sqrt() + 1e-3).all()


@pytest.mark.parametrize("stop", ["bos_token_id", "eos_token_id"])
def test_causal_generation_ends_at_bos_or_eos_and_unmasked_does_not(stop):
    for causal in (True, False):
        llama = make_llama(causal=causal, **{stop: 0})
        torch.nn.init.zeros_(llama.norm.weight)  # every logit is 0, so the likeliest token is 0
        ids = llama.generate(torch.tensor([[5]]), 5, temperature=0.0)
        assert ids.shape[1] == (1 if causal else 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_causal_model_generates_in_its_own_precision(dtype):
    llama = make_llama(causal=True).to(dtype)
    ids = prompt = torch.tensor([[1, 40, 50]])
    for _ in range(6):
        with torch.inference_mode():
            ids = torch.cat((ids, llama(ids)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(llama.generate(prompt, 6, 0.0, stop_ids=()), ids)
    new = [token for (token,) in decode(llama, prompt.tolist(), 6, Sampling(0.0), ())]
    assert new == ids[0, 3:].tolist()


def test_ended_rows_are_filled_with_eos_while_others_go_on():
    llama = make_llama(vocab_size=16, scale=1.0, causal=True)  # nearly uniform: one in 8 is a stop
    torch.manual_seed(0)
    ids = llama.generate(torch.full((12, 1), 7), 90, temperature=1.0)[:, 1:]
    ends = []
    for row in ids.tolist():
        ends.append(next((i for i, token in enumerate(row) if token in (1, 2)), len(row)))
        assert set(row[ends[-1] :]) <= {2}
    assert len(set(ends)) > 3
    assert max(ends) == ids.shape[1] < 90  # it stops when the last row ends


def test_initial_weights_have_the_assignments_deviations_and_are_tied():
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(dim=256, n_layers=8, n_heads=4, n_kv_heads=4, vocab_size=2000))
    assert llama.tok_embeddings.weight is llama.output.weight
    layer = llama.layers[0]
    for module, deviation in [
        (llama.output, 0.02),
        (layer.attention.compute_query, 0.02),
        (layer.feed_forward.w2, 0.02),
        (layer.feed_forward.w3, 0.02 / 4),
        (layer.attention.compute_output, 0.02 / 4),
    ]:
        assert module.weight.std().item() == pytest.approx(deviation, rel=0.03)


def test_initialisation_consumes_the_generator_as_the_assignment_does():
    """What is drawn next (a head, the batches' order) depends on every draw made before."""
    torch.manual_seed(1337)
    Llama(LlamaConfig(**MODEL_ARGS))
    after = torch.get_rng_state()

    torch.manual_seed(1337)
    dim, hidden, kv_dim = 32, 96, 16
    embedding = torch.nn.Embedding(320, dim)
    layers = []
    for _ in range(2):
        shapes = [(dim, dim), (dim, kv_dim), (dim, kv_dim), (dim, dim)]
        shapes += [(dim, hidden), (hidden, dim), (dim, hidden)]
        layers += [torch.nn.Linear(*shape, bias=False) for shape in shapes]
    output = torch.nn.Linear(dim, 320, bias=False)
    embedding.weight = output.weight
    for module in [embedding, *layers, output]:
        torch.nn.init.normal_(module.weight)
    for i, linear in enumerate(layers):
        if i % 7 in (3, 6):
            torch.nn.init.normal_(linear.weight)
    assert torch.equal(torch.get_rng_state(), after)


def test_rms_norm_computes_in_float32_whatever_it_is_given():
    norm = RMSNorm(8, eps=1e-5)
    x = torch.randn(2, 3, 8) * 100
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(norm._norm(x).double(), expected, rtol=1e-6)
    assert RMSNorm(8).eps == 1e-6
    huge = torch.full((1, 8), 300.0, dtype=torch.float16)  # its square overflows float16
    norm.weight.data = norm.weight.data.half()
    assert norm(huge).dtype == torch.float16
    assert torch.allclose(norm(huge), torch.ones(1, 8).half())


def test_attention_scores_accept_shared_and_repeated_keys():
    attention = Attention(LlamaConfig(**MODEL_ARGS)).eval()
    query = torch.randn(2, 4, 5, 8)
    key, value = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    repeated = [x.repeat_interleave(2, dim=1) for x in (key, value)]
    shared = attention.compute_query_key_value_scores(query, key, value)
    assert torch.allclose(
        shared, attention.compute_query_key_value_scores(query, *repeated), atol=1e-6
    )
    weights = (query.double() @ repeated[0].double().transpose(2, 3) / math.sqrt(8)).softmax(-1)
    assert torch.allclose(shared.double(), weights @ repeated[1].double(), atol=1e-6)


def test_feed_forward_rounds_its_width_up():
    assert FeedForward(512, None, 32, 0.0).w1.weight.shape == (1376, 512)
    assert FeedForward(64, 100, 32, 0.0).w2.weight.shape == (64, 100)


def test_dropout_acts_in_training_only():
    llama = make_llama(dropout=0.5)
    tokens = torch.tensor([[1, 4, 5, 6]])
    with torch.inference_mode():
        assert torch.equal(llama(tokens)[1], llama(tokens)[1])
        llama.train()
        assert not torch.equal(llama(tokens)[1], llama(tokens)[1])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dim": 30}, "dim 30 is not a multiple of n_heads 4"),
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"dim": 36}, "dim / n_heads is 9"),
    ],
)
def test_heads_that_do_not_divide_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        Llama(LlamaConfig(**(MODEL_ARGS | change)))


def test_the_assignments_methods_can_be_replaced(monkeypatch):
    """Other people's scores have the assignment's signature, and no further arguments."""

    def scores(self, query, key, value):
        key, value = (x.repeat_interleave(self.n_rep, dim=1) for x in (key, value))
        return (query @ key.transpose(2, 3) / self.head_dim**0.5).softmax(-1) @ value

    llama, tokens = make_llama(), torch.tensor([[1, 4, 5, 6]])
    with torch.inference_mode():
        expected = llama.hidden_states(tokens, torch.tensor([[3]]))
        monkeypatch.setattr(Attention, "compute_query_key_value_scores", scores)
        assert torch.allclose(llama.hidden_states(tokens, torch.tensor([[3]])), expected, atol=1e-5)
        monkeypatch.setattr(Attention, "forward", lambda self, x, cache: torch.zeros_like(x))
        assert not torch.allclose(llama(tokens)[1][:, -1:], expected, atol=1e-2)


def test_config_keeps_further_keywords():
    config = LlamaConfig(dim=64, flash=True)
    assert (config.dim, config.flash, config.causal, config.n_layers) == (64, True, False, 8)
