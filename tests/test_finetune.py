"""Batches by length, accumulation, checkpointing and mixed precision in fine-tuning."""

import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import SENTENCES, make_llama, save_llama

import batching
from batching import LengthBatchSampler, SortedBatchSampler, make_loader
from classifier import LlamaEmbeddingClassifier
from evaluation import model_eval
from finetune import classification_loss, predict, train_epoch
from optimizer import AdamW
from training import checkpoint_activations, mixed_precision

CPU = torch.device("cpu")
LENGTHS = [int(n) for n in torch.randint(3, 60, (203,), generator=torch.Generator().manual_seed(0))]


def draw(seed: int, batch_size: int = 10) -> list[list[int]]:
    torch.manual_seed(seed)
    return list(LengthBatchSampler(LENGTHS, batch_size))


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    monkeypatch.setattr(batching, "POOL", 4)


def test_every_row_comes_once_an_epoch():
    batches = draw(0)
    assert sorted(row for batch in batches for row in batch) == list(range(203))
    assert sorted(map(len, batches)) == [3] + [10] * 20
    assert len(LengthBatchSampler(LENGTHS, 10)) == len(batches)


def test_batches_follow_from_the_seed():
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    torch.manual_seed(0)
    sampler = LengthBatchSampler(LENGTHS, 10)
    assert list(sampler) != list(sampler)  # another order each epoch


def test_rows_of_a_batch_are_of_about_the_same_length():
    def padded(batches):
        return sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)

    rows = torch.randperm(203).tolist()
    shuffled = padded([rows[i : i + 10] for i in range(0, 203, 10)])
    assert padded(draw(0)) - sum(LENGTHS) < 0.4 * (shuffled - sum(LENGTHS))


def test_the_longest_row_comes_first_and_the_rest_is_shuffled():
    for seed in range(5):
        longest = [max(LENGTHS[row] for row in batch) for batch in draw(seed)]
        assert longest[0] == max(LENGTHS)
        assert longest != sorted(longest, reverse=True)


def test_one_small_pool_is_one_batch():
    assert [sorted(batch) for batch in LengthBatchSampler([5, 3, 4], 10)] == [[0, 1, 2]]


@pytest.fixture
def data(tokenizer):
    """30 labelled sentences of different lengths."""
    rows = []
    for i in range(30):
        sentence = " ".join(SENTENCES[i % 6].split()[: 2 + i % 7])
        rows.append((f"{sentence} {i}", i % 3, tokenizer.encode(f"{sentence} {i}", True, False)))
    return rows


@pytest.fixture
def make_classifier(tmp_path):
    """Makes the same classifier each time."""

    def make(causal=True, dropout=0.0):
        config = SimpleNamespace(
            pretrained_model_path=save_llama(make_llama(scale=3.0), tmp_path / "m.pt"),
            num_labels=3,
            option="finetune",
            hidden_dropout_prob=dropout,
            causal=causal,
        )
        torch.manual_seed(3)
        return LlamaEmbeddingClassifier(config)

    return make


@pytest.fixture
def loader_of(data, tokenizer_path):
    def make(batch_size, **kwargs):
        args = SimpleNamespace(
            batch_size=batch_size, max_sentence_len=None, tokenizer_path=tokenizer_path
        )
        return make_loader(data, args, **kwargs)

    return make


def test_evaluation_is_sorted_and_put_back_in_order(data, make_classifier, loader_of):
    loader = loader_of(7, causal=True)
    assert isinstance(loader.batch_sampler, SortedBatchSampler)
    lengths = [len(data[row][2]) for batch in loader.batch_sampler for row in batch]
    assert lengths == sorted(lengths, reverse=True)
    _, _, _, y_true, sents = model_eval(loader, make_classifier(), CPU)
    assert sents == [sentence for sentence, _, _ in data]
    assert y_true == [label for _, label, _ in data]


def test_predictions_do_not_depend_on_the_batches(data, make_classifier, loader_of):
    model = make_classifier().eval()
    with torch.inference_mode():
        scores = torch.cat(
            [model(torch.tensor([ids]), torch.tensor([len(ids)])) for *_, ids in data]
        )
    best, second = scores.topk(2).values.T
    clear = (best - second > 1e-4).tolist()
    assert sum(clear) > 25
    for batch_size in (1, 10, 80):
        _, _, y_pred, *_ = model_eval(loader_of(batch_size, causal=True), model, CPU)
        expected = scores.argmax(-1).tolist()
        assert [p for p, c in zip(y_pred, clear, strict=True) if c] == [
            p for p, c in zip(expected, clear, strict=True) if c
        ]


def trained(model, loader, grad_accum=1, dtype="float32", batch_size=10, epochs=2, seed=0):
    torch.manual_seed(seed)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    log_probs = functools.partial(predict, device=CPU, dtype=dtype)
    loss = functools.partial(classification_loss, batch_size=batch_size, log_probs=log_probs)
    losses = [train_epoch(model, loader, optimizer, loss, e, grad_accum) for e in range(epochs)]
    return losses, model.state_dict()


def test_accumulated_batches_are_one_large_batch(data, make_classifier, loader_of):
    """Without padding, as a row alone has none, the gradient is that of the large batch."""
    torch.manual_seed(0)
    order = torch.randperm(30).tolist()
    large = [[order[i : i + 10] for i in (0, 10, 20)]]
    small = [[[row] for row in order]]
    results = []
    for batches, grad_accum, batch_size in ((large[0], 1, 10), (small[0], 10, 1)):
        loader = loader_of(10, causal=True)
        loader = torch.utils.data.DataLoader(
            loader.dataset, batch_sampler=batches, collate_fn=loader.dataset.collate_fn
        )
        results.append(trained(make_classifier(), loader, grad_accum, batch_size=batch_size))
    (losses, weights), (other_losses, other_weights) = results
    assert losses == pytest.approx(other_losses, rel=1e-4)
    for name in weights:
        assert torch.allclose(weights[name], other_weights[name], atol=2e-5), name


def test_a_last_smaller_group_takes_a_smaller_step():
    """As the last smaller batch does: each row weighs the same in the whole epoch."""
    rows = [{"x": torch.tensor(float(i))} for i in range(5)]
    model = torch.nn.Linear(1, 1, bias=False)
    gradients = []

    class Recorder(torch.optim.SGD):
        def step(self):
            gradients.append(model.weight.grad.item())

    def loss(batch, model):
        return (model.weight * batch["x"]).sum()

    optimizer = Recorder(model.parameters(), lr=0.0)
    calls = []
    mean = train_epoch(model, rows, optimizer, loss, 2, 2, [lambda m, step: calls.append(step)])
    assert gradients == [0.5, 2.5, 2.0]
    assert calls == [7, 8, 9]
    assert mean == pytest.approx(model.weight.item() * 2)


def test_checkpointing_computes_the_layers_again(make_classifier, loader_of):
    counts = []
    for checkpointing in (False, True):
        model, calls = make_classifier(), []
        if checkpointing:
            checkpoint_activations(model.llama.layers)
        for layer in model.llama.layers:
            layer.attention.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        trained(model, loader_of(10, causal=True, shuffle=True), epochs=1)
        counts.append(len(calls))
    assert counts == [2 * 3, 2 * 2 * 3]


def test_log_probabilities_are_float32_under_autocast(make_classifier):
    model = make_classifier().eval()
    with mixed_precision(CPU, "bfloat16"):
        log_probs = model(torch.tensor([[1, 5, 6]]), torch.tensor([3]))
    assert log_probs.dtype == torch.float32
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_the_largest_batch_comes_first_even_if_a_small_one_has_the_longest_row():
    for seed in range(300):
        torch.manual_seed(seed)
        lengths = [int(n) for n in torch.randint(3, 60, (45,))]
        sampler = LengthBatchSampler(lengths, 10)
        sizes = [len(batch) * max(lengths[i] for i in batch) for batch in sampler]
        assert sizes[0] == max(sizes)


def test_checkpointed_activations_change_nothing(make_classifier, loader_of):
    plain = trained(make_classifier(dropout=0.3), loader_of(10, causal=True, shuffle=True))
    model = make_classifier(dropout=0.3)
    checkpoint_activations(model.llama.layers)
    checkpointed = trained(model, loader_of(10, causal=True, shuffle=True))
    assert plain[0] == checkpointed[0]
    for name in plain[1]:
        assert torch.equal(plain[1][name], checkpointed[1][name]), name


def test_bfloat16_keeps_float32_weights_and_the_loss(make_classifier, loader_of):
    plain = trained(make_classifier(), loader_of(10, causal=True, shuffle=True))
    mixed = trained(make_classifier(), loader_of(10, causal=True, shuffle=True), dtype="bfloat16")
    assert plain[0] != mixed[0]
    assert plain[0] == pytest.approx(mixed[0], rel=0.02)
    assert {tensor.dtype for tensor in mixed[1].values()} == {torch.float32}


def test_norms_stay_in_float32_under_autocast(make_classifier):
    model = make_classifier()
    dtypes = {}
    for name, module in model.named_modules():
        if name.endswith(("norm", "compute_query")):
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name: dtypes.update({name: output.dtype})
            )
    with mixed_precision(CPU, "bfloat16"):
        model(torch.tensor([[1, 5, 6]]), torch.tensor([3]))
    for name, dtype in dtypes.items():
        expected = torch.bfloat16 if name.endswith("compute_query") else torch.float32
        assert dtype == expected, name
