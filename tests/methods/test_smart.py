"""SMART against its definition, example by example."""

import pytest
import torch
import torch.nn.functional as F
from methods_kit import BATCH, NAMES, loss_of, make_training, predictions, snapshot

from minllama.methods.smart import averaged_model, perturbed_embeddings

pytest_plugins = ["methods_fixtures"]


def divergence(log_p, log_q):
    both = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    return both + F.kl_div(log_p, log_q, log_target=True, reduction="sum")


def test_the_regularizers_are_computed_without_dropout(make_classifier):
    losses = []
    for flags in ({}, {"smart": 5.0, "smart_radius": 0.0}):
        training = make_training(make_classifier(hidden_dropout_prob=0.5, **flags))
        training.model.train()
        torch.manual_seed(0)
        losses.append(loss_of(training).item())
        assert training.model.dropout.training
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_smarts_loss_is_its_definition(make_classifier):
    """Two ascent steps from given noise, row by row; then the weighted sum of three terms."""
    flags = {"smart_radius": 0.25, "smart_step_size": 0.2, "smart_noise": 0.02, "smart_mu": 0.7}
    training = make_training(make_classifier(smart=3.0, smart_steps=2, **flags))
    model, average = training.model, make_classifier().model
    with torch.no_grad():
        model.classifier_head.weight.mul_(3).add_(0.1)
    unit = average.llama.tok_embeddings.weight.std().item()

    def log_probs(classifier, row, change=0.0):
        handle = classifier.llama.tok_embeddings.register_forward_hook(lambda *c: c[-1] + change)
        output = classifier(BATCH.token_ids[row : row + 1], BATCH.lengths[row : row + 1])
        handle.remove()
        return output

    torch.manual_seed(3)
    noise = torch.randn(6, 11, 32) * 0.02 * unit
    expected = 0.0
    for row in range(6):
        log_p = log_probs(model, row)
        delta = noise[row : row + 1]
        for _ in range(2):
            delta = delta.clone().requires_grad_()
            value = divergence(log_p.detach(), log_probs(model, row, delta))
            (gradient,) = torch.autograd.grad(value, delta)
            delta = delta.detach() + 0.2 * unit * gradient / gradient.abs().max()
            delta = delta.clamp(-0.25 * unit, 0.25 * unit)
        expected += -log_p[0, BATCH.labels[row]]
        expected += 3.0 * divergence(log_p, log_probs(model, row, delta))
        expected += 0.7 * divergence(log_p, log_probs(average, row))
    model.train()
    torch.manual_seed(3)
    assert loss_of(training).item() == pytest.approx(expected.item() / 6, rel=1e-3)


def test_a_smaller_last_batch_weighs_less(make_classifier):
    """The regularized losses of two halves sum to that of the whole, as plain losses do."""
    flags = {"smart_radius": 0.0, "smart_momentum": 1.0}
    training = make_training(make_classifier(smart=5.0, **flags))
    with torch.no_grad():  # so that the averaged model differs
        head = training.model.classifier_head.weight
        head.add_(torch.randn_like(head))
    training.model.train()
    plain = F.nll_loss(training.log_probs(BATCH), BATCH.labels).item()
    whole = loss_of(training).item()
    assert whole > 1.1 * plain
    halves = [BATCH.select(rows) for rows in (slice(4), slice(4, 6))]
    assert sum(loss_of(training, half).item() for half in halves) == pytest.approx(whole, rel=1e-4)


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


def test_the_averaged_model_is_the_moving_average(make_classifier):
    training = make_training(make_classifier(smart=1.0, smart_momentum=0.9))
    (smart,) = training.settings.methods
    model, expected = training.model, snapshot(training.model)
    for step in range(1, 4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        smart.after_step(training, step)
        expected = {n: 0.9 * expected[n] + 0.1 * p for n, p in snapshot(model).items()}
    with torch.no_grad():
        averaged = averaged_model(training)(BATCH.token_ids, BATCH.lengths)
    assert not torch.allclose(averaged, predictions(model), atol=1e-3)
    model.load_state_dict(expected, strict=False)
    assert torch.allclose(averaged, predictions(model), atol=1e-5)
