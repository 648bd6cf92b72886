"""Evaluation in order, accumulation, checkpointing and mixed precision in fine-tuning."""

from types import SimpleNamespace

import pytest
import torch
from conftest import SENTENCES, make_llama, save_llama

import minllama.text.batches
from classifier import LlamaEmbeddingClassifier
from minllama.evaluation.classification import model_eval
from minllama.tasks.epoch import ClassificationLoss, train_epoch
from minllama.text.batches import Batch, Example, SortedBatchSampler, make_loader
from minllama.training.activation_checkpointing import checkpoint_activations
from minllama.training.step import mixed_precision
from optimizer import AdamW

CPU = torch.device("cpu")


@pytest.fixture
def data(tokenizer):
    """30 labelled sentences of different lengths."""
    rows = []
    for i in range(30):
        sentence = " ".join(SENTENCES[i % 6].split()[: 2 + i % 7])
        ids = tokenizer.encode(f"{sentence} {i}", True, False)
        rows.append(Example(f"{sentence} {i}", i % 3, ids))
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
def loader_of(data, tokenizer):
    def make(batch_size, **kwargs):
        return make_loader(data, batch_size, tokenizer.pad_id, **kwargs)

    return make


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    monkeypatch.setattr(minllama.text.batches, "POOL", 4)


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
    loss = ClassificationLoss(batch_size, CPU, dtype)
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
            loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn
        )
        results.append(trained(make_classifier(), loader, grad_accum, batch_size=batch_size))
    (losses, weights), (other_losses, other_weights) = results
    assert losses == pytest.approx(other_losses, rel=1e-4)
    for name in weights:
        assert torch.allclose(weights[name], other_weights[name], atol=2e-5), name


def test_a_last_smaller_group_takes_a_smaller_step():
    """As the last smaller batch does: each row weighs the same in the whole epoch."""
    rows = [Batch(torch.tensor([float(i)]), torch.zeros(1), []) for i in range(5)]
    model = torch.nn.Linear(1, 1, bias=False)
    gradients = []

    class Recorder(torch.optim.SGD):
        def step(self):
            gradients.append(model.weight.grad.item())

    def loss(batch, model):
        return (model.weight * batch.token_ids).sum()

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
        for layer in model.llama.layers:
            layer.attention.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        if checkpointing:
            checkpoint_activations(model.llama.layers)
        trained(model, loader_of(10, causal=True, shuffle=True), epochs=1)
        counts.append(len(calls))
    assert counts == [2 * 3, 2 * 2 * 3]


def test_log_probabilities_are_float32_under_autocast(make_classifier):
    model = make_classifier().eval()
    with mixed_precision(CPU, "bfloat16"):
        log_probs = model(torch.tensor([[1, 5, 6]]), torch.tensor([3]))
    assert log_probs.dtype == torch.float32
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-6)


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
