"""The loop of fine-tuning: order, accumulation, precision, checkpointing, and the best weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES
from torch.optim.optimizer import register_optimizer_step_pre_hook

import minllama.text.batches
from minllama.checkpoints.pt import read_checkpoint
from minllama.methods.classify import Classifier
from minllama.methods.settings import FinetuneSettings
from minllama.tasks.finetune import train_epochs
from minllama.text.batches import Example
from minllama.training.activation_checkpointing import checkpoint_activations
from minllama.training.precision import mixed_precision

pytest_plugins = ["methods_fixtures"]


@pytest.fixture
def data(tokenizer) -> list[Example]:
    """30 labelled sentences of different lengths."""
    examples = []
    for i in range(30):
        sentence = " ".join(SENTENCES[i % 6].split()[: 2 + i % 7])
        ids = tokenizer.encode(f"{sentence} {i}", True, False)
        examples.append(Example(f"{sentence} {i}", i % 3, ids))
    return examples


@pytest.fixture(autouse=True)
def small_pools(monkeypatch, tmp_path):
    """Batches of other lengths, and a working folder for the weights."""
    monkeypatch.setattr(minllama.text.batches, "POOL", 2)
    monkeypatch.chdir(tmp_path)


def train(
    classifier: Classifier, data: list[Example], **flags
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train; return the losses of the epochs and the best epoch's weights."""
    flags = {"option": "finetune", "lr": 1e-3, "epochs": 2, "batch_size": 10} | flags
    settings = FinetuneSettings(filepath="best.pt", skip_train_eval=True, **flags)
    torch.manual_seed(0)
    records = train_epochs(settings, classifier, data, data[:6])
    return [record["train_loss"] for record in records], classifier.model.state_dict()


def test_each_example_weighs_the_same_in_an_epoch(data, make_classifier):
    """With a rate of 0 the gradients of all steps add up, also of a smaller last step."""
    classifier, gradients = make_classifier(tune="head"), []
    head = classifier.model.classifier_head.weight
    hook = register_optimizer_step_pre_hook(lambda *_: gradients.append(head.grad.clone()))
    losses, _ = train(classifier, data[:5], batch_size=2, grad_accum=2, lr=0.0, epochs=1)
    hook.remove()
    each = []
    for _, label, ids in data[:5]:
        log_probs = classifier.model.eval()(torch.tensor([ids]), torch.tensor([len(ids)]))
        loss = F.nll_loss(log_probs, torch.tensor([label]))
        each.append((loss.item(), torch.autograd.grad(loss, head)[0]))
    assert len(gradients) == 2
    sum_of_each = sum(gradient for _, gradient in each)
    torch.testing.assert_close(sum(gradients), sum_of_each / (2 * 2), atol=1e-5, rtol=1e-4)
    # Three batches, the last of which is half full.
    assert losses == [pytest.approx(sum(loss for loss, _ in each) / (3 * 2), rel=1e-5)]


def test_checkpointed_activations_are_recomputed_and_change_nothing(data, make_classifier):
    results, counts = [], []
    for is_checkpointed in (False, True):
        classifier, calls = make_classifier(hidden_dropout_prob=0.3), []
        layers = classifier.model.llama.layers
        layers[0].attention.register_forward_hook(lambda *_, c=calls: c.append(1))
        if is_checkpointed:
            checkpoint_activations(layers)
        results.append(train(classifier, data))
        counts.append(len(calls))
    assert counts[1] - counts[0] == 2 * 3  # a second time in each step
    assert results[0][0] == results[1][0]
    for name, tensor in results[0][1].items():
        assert torch.equal(tensor, results[1][1][name]), name


def test_bfloat16_rounds_products_and_keeps_float32_elsewhere(data, make_classifier):
    plain, _ = train(make_classifier(), data)
    classifier, dtypes = make_classifier(), {}
    classifier.dtype = "bfloat16"
    mixed, weights = train(classifier, data)
    assert plain != mixed and plain == pytest.approx(mixed, rel=0.02)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    for name, module in classifier.model.named_modules():
        if name.endswith(("norm", "compute_query")):
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name: dtypes.update({name: output.dtype})
            )
    with mixed_precision(torch.device("cpu"), "bfloat16"):
        log_probs = classifier.model.eval()(torch.tensor([[1, 5, 6]]), torch.tensor([3]))
    assert log_probs.dtype == torch.float32
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-6)
    for name, dtype in dtypes.items():
        expected = torch.bfloat16 if name.endswith("compute_query") else torch.float32
        assert dtype == expected, name


def test_the_best_epochs_weights_are_kept(data, make_classifier, monkeypatch):
    """The accuracies on dev are scripted, so that the second of four epochs is the best."""
    script, evaluated = iter((0.3, 0.6, 0.6, 0.2)), []
    evaluate = Classifier.evaluate

    def scripted(self, loader):
        evaluated.append(copy.deepcopy(self.model.state_dict()))
        return evaluate(self, loader)._replace(accuracy=next(script))

    monkeypatch.setattr(Classifier, "evaluate", scripted)
    _, weights = train(make_classifier(), data, epochs=4)
    saved = read_checkpoint("best.pt")["model"]
    for name, tensor in evaluated[1].items():
        assert torch.equal(saved[name], tensor) and torch.equal(weights[name], tensor), name
    assert not torch.equal(evaluated[3]["llama.norm.weight"], weights["llama.norm.weight"])
