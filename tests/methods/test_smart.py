"""SMART against its definition, row by row."""

import copy

import pytest
import torch
import torch.nn.functional as F
from methods_kit import BATCH, NAMES, make_recipe, predictions, snapshot, train

from minllama.methods.smart import SmartLoss, perturbed_embeddings, symmetric_divergence
from minllama.tasks.epoch import train_epoch
from minllama.text.batches import Batch
from optimizer import AdamW

pytest_plugins = ["methods_fixtures"]


def test_the_divergence_is_symmetric_and_zero_of_equals():
    p, q = torch.randn(2, 8, 5).log_softmax(-1)
    assert symmetric_divergence(p, q).item() == pytest.approx(symmetric_divergence(q, p).item())
    assert symmetric_divergence(p, p).item() == 0
    expected = F.kl_div(q, p, log_target=True, reduction="sum")
    expected += F.kl_div(p, q, log_target=True, reduction="sum")
    assert symmetric_divergence(p, q).item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_perturbation_smart_is_plain_training(make_model):
    plain, smooth = make_model(), make_model()
    flags = {"smart": 5.0, "smart_radius": 0.0, "smart_mu": 0.0}
    assert train(smooth, **flags) == pytest.approx(train(plain), abs=1e-5)


def test_the_regularizers_are_computed_without_dropout(make_model):
    model = make_model(hidden_dropout_prob=0.5)
    recipe = make_recipe(model, smart=5.0, smart_radius=0.0)
    model.train()
    torch.manual_seed(0)
    plain = recipe.loss.loss(BATCH, model).item()
    torch.manual_seed(0)
    assert recipe.loss(BATCH, model).item() == pytest.approx(plain, abs=1e-5)
    assert model.training and model.dropout.training


def test_smarts_loss_is_its_definition(make_model):
    """One ascent step from given noise, row by row; then the weighted sum of three terms."""
    model, average = make_model(), make_model()
    flags = {"smart_radius": 0.5, "smart_step_size": 0.3, "smart_noise": 0.02, "smart_mu": 0.7}
    smart = make_recipe(model, smart=3.0, **flags).loss
    with torch.no_grad():
        model.classifier_head.weight.mul_(3).add_(0.1)
    unit = average.llama.tok_embeddings.weight.std().item()

    def log_probs(classifier, row, change=0.0):
        handle = classifier.llama.tok_embeddings.register_forward_hook(lambda *c: c[-1] + change)
        output = classifier(BATCH.token_ids[row : row + 1], BATCH.lengths[row : row + 1])
        handle.remove()
        return output

    def divergence(log_p, log_q):
        both = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        return both + F.kl_div(log_p, log_q, log_target=True, reduction="sum")

    torch.manual_seed(3)
    noise = torch.randn(6, 11, 32) * 0.02 * unit
    expected = 0.0
    for row in range(6):
        log_p = log_probs(model, row)
        delta = noise[row : row + 1].clone().requires_grad_()
        value = divergence(log_p.detach(), log_probs(model, row, delta))
        (gradient,) = torch.autograd.grad(value, delta)
        delta = delta.detach() + 0.3 * unit * gradient / gradient.abs().max()
        delta = delta.clamp(-0.5 * unit, 0.5 * unit)
        expected += -log_p[0, BATCH.labels[row]]
        expected += 3.0 * divergence(log_p, log_probs(model, row, delta))
        expected += 0.7 * divergence(log_p, log_probs(average, row))
    model.train()
    torch.manual_seed(3)
    assert smart(BATCH, model).item() == pytest.approx(expected.item() / 6, rel=1e-3)


def test_a_smaller_last_batch_weighs_less(make_model):
    """The regularized losses of two halves sum to that of the whole, as plain losses do."""
    model = make_model()
    recipe = make_recipe(model, smart=5.0, smart_radius=0.0, smart_momentum=1.0)
    with torch.no_grad():  # so that the averaged model differs
        model.classifier_head.weight.add_(torch.randn_like(model.classifier_head.weight))
    model.train()
    halves = [
        Batch(BATCH.token_ids[rows], BATCH.labels[rows], [], BATCH.lengths[rows])
        for rows in (slice(4), slice(4, 6))
    ]
    whole = recipe.loss(BATCH, model).item()
    assert whole > 1.1 * recipe.loss.loss(BATCH, model).item()
    assert sum(recipe.loss(half, model).item() for half in halves) == pytest.approx(whole, rel=1e-4)


def test_the_perturbation_stays_in_its_ball_and_ascends(make_model):
    model = make_model()
    smart = make_recipe(model, smart=1.0, smart_radius=0.5, smart_step_size=0.2, smart_steps=4).loss
    assert isinstance(smart, SmartLoss)
    model.eval()
    log_p = predictions(model)
    torch.manual_seed(0)
    delta = smart.ascend(BATCH, model, log_p)
    radius = 0.5 * model.llama.tok_embeddings.weight.std().item()
    assert delta.abs().max().item() <= radius * 1.0001
    random = torch.randn_like(delta).sign() * radius

    def divergence(change):
        handle = model.llama.tok_embeddings.register_forward_hook(lambda *call: call[-1] + change)
        result = symmetric_divergence(log_p, predictions(model)).item()
        handle.remove()
        return result

    assert divergence(delta) > 3 * divergence(random) > 0
    assert divergence(torch.zeros_like(delta)) < 1e-9


def test_a_perturbation_moves_the_prompts_and_not_the_labels(make_model, tokenizer):
    """Row by row, without a cache, δ added to the embeddings of the prompt's tokens."""
    model = make_model(prompt_based=True).eval()
    embeddings = model.llama.tok_embeddings
    delta = torch.randn(6, 11, 32, generator=torch.Generator().manual_seed(0))
    delta *= embeddings.weight.std()
    plain = predictions(model)
    with perturbed_embeddings(embeddings, delta):
        moved = predictions(model)
    assert (moved - plain).abs().max() > 0.1
    for row, length in enumerate(BATCH.lengths.tolist()):
        scores = []
        for name in NAMES:
            ids = tokenizer.encode(name, bos=False, eos=False)
            tokens = torch.tensor([BATCH.token_ids[row, :length].tolist() + ids])
            change = torch.zeros(1, len(tokens[0]), 32)
            change[0, :length] = delta[row, :length]
            with torch.no_grad(), perturbed_embeddings(embeddings, change):
                hidden = model.llama.hidden_states(tokens)[0]
                log_probs = model.llama.output(hidden).log_softmax(-1)
            scores.append(sum(log_probs[length + i - 1, token] for i, token in enumerate(ids)))
        expected = torch.stack(scores).log_softmax(-1)
        assert torch.allclose(moved[row], expected, atol=1e-4)
    assert torch.equal(predictions(model), plain)  # nothing stays behind


def test_the_averaged_model_is_the_moving_average(make_model):
    model = make_model()
    expected = snapshot(model)
    recipe = make_recipe(model, smart=1.0, smart_momentum=0.9)
    smart, optimizer = recipe.loss, AdamW(recipe.groups, lr=1e-2)
    for epoch in range(3):
        train_epoch(model, [BATCH], optimizer, smart, epoch, 1, recipe.after_step)
        expected = {n: 0.9 * expected[n] + 0.1 * p for n, p in snapshot(model).items()}
    for name, mean in smart.average.items():
        assert torch.allclose(mean, expected[name], atol=1e-6), name
    average = copy.deepcopy(model)
    average.load_state_dict(expected, strict=False)
    model.eval()
    assert torch.allclose(
        smart.averaged(BATCH.token_ids, BATCH.lengths), predictions(average), atol=1e-5
    )


def test_smarts_average_follows_where_it_is_used(trained):
    call = trained("--smart", "1")
    assert call.after_step == [call.loss.update_average] and call.loss.average
    call = trained("--smart", "1", "--smart_mu", "0")
    assert call.after_step == [] and not call.loss.average
