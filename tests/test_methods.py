"""Each method of fine-tuning against an independent statement of its definition."""

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_llama, save_llama

import methods
from base_llama import read_checkpoint
from calibration import Calibrated
from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from decoding import KVCache
from finetune import classification_loss, predict, train_epoch
from lora import LoRALinear, merge_lora
from mixout import MixoutLinear, add_mixout
from optimizer import AdamW
from prefix import PrefixAttention, add_prefix
from prompt_based import PromptClassifier, few_shot
from prompts import make_prompts
from recipe import Recipe
from schedule import groups_by_depth
from smart import Smart, symmetric_divergence
from training import checkpoint_activations, warmup_decay
from tuning import CHOICES, adapt, count_parameters, load_trained, trained_state
from utils import InputError
from wise_ft import mix

CPU = torch.device("cpu")
NAMES = ["bad", "fair enough", "good"]
NAME_IDS = {"bad": [5], "fair enough": [6, 7], "good": [8]}
TOKENS = torch.randint(3, 320, (6, 11), generator=torch.Generator().manual_seed(1))
BATCH = {
    "token_ids": TOKENS,
    "lengths": torch.tensor([11, 10, 7, 11, 5, 8]),
    "labels": torch.tensor([0, 1, 2, 0, 1, 2]),
}


def config_of(path, **changes):
    """A configuration with all methods off, but for the changes."""
    settings = {
        "pretrained_model_path": save_llama(make_llama(scale=3.0), path),
        "num_labels": 3,
        "option": "finetune",
        "hidden_dropout_prob": 0.0,
        "causal": True,
    }
    return SimpleNamespace(**(settings | methods.defaults() | changes))


@pytest.fixture
def make_model(tmp_path, tokenizer):
    """Makes the same classifier each time, with methods as the flags say."""

    def make(**flags):
        config = config_of(tmp_path / "m.pt", **flags)
        torch.manual_seed(2)
        if config.prompt_based:
            model = PromptClassifier(config, tokenizer, NAMES)
        else:
            model = LlamaEmbeddingClassifier(config)
        adapt(model, config)
        return model

    return make


def make_recipe(model, n_steps=3, **flags):
    args = SimpleNamespace(**(methods.defaults() | {"lr": 1e-2, "batch_size": 6} | flags))
    log_probs = functools.partial(predict, device=CPU, dtype="float32")
    loss = functools.partial(classification_loss, batch_size=6, log_probs=log_probs)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": args.lr}]
    tokenizer = SimpleNamespace(encode=lambda name, *_: NAME_IDS[name])
    recipe = Recipe(args, model, NAMES, tokenizer, log_probs, loss, groups, n_steps, lambda: 0.0)
    methods.prepare(recipe)
    return recipe


def train(model, n_steps=3, **flags):
    """Some steps on one batch; returns the losses and the optimizer."""
    recipe = make_recipe(model, n_steps, **flags)
    optimizer = AdamW(recipe.groups, lr=1e-2)
    losses = []
    for step in range(n_steps):
        loss = train_epoch(model, [BATCH], optimizer, recipe.loss, step, 1, recipe.after_step)
        losses.append(loss)
    return losses, recipe, optimizer


@torch.no_grad()
def predictions(model):
    return model.eval()(BATCH["token_ids"], BATCH["lengths"])


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# Parameter-efficient tuning


@pytest.mark.parametrize("tune", ["head", "lora", "adapter", "norm"])
def test_nothing_changes_before_training(make_model, tune):
    assert torch.allclose(predictions(make_model(tune=tune)), predictions(make_model()), atol=1e-6)


@pytest.mark.parametrize("tune", CHOICES)
@pytest.mark.parametrize("prompt_based", [False, True])
def test_frozen_tensors_stay_and_the_others_train(make_model, tune, prompt_based):
    if tune == "head" and prompt_based:
        with pytest.raises(InputError, match="nothing to train"):
            make_model(tune=tune, prompt_based=True)
        return
    model = make_model(tune=tune, prompt_based=prompt_based)
    before = snapshot(model)
    losses, *_ = train(model, 6)
    assert losses[-1] < losses[0]
    parts = {
        "full": "",
        "head": "classifier_head",
        "lora": "lora_",
        "adapter": "adapter.",
        "prefix": "prefix_",
        "norm": "norm.weight",
    }
    n_trained = 0
    for name, parameter in model.named_parameters():
        trains = parts[tune] in name or name.startswith("classifier_head")
        assert parameter.requires_grad == trains, name
        assert torch.equal(parameter, before[name]) != trains, name
        n_trained += trains * parameter.numel()
    assert count_parameters(model)[0] == n_trained


@pytest.mark.parametrize("tune", CHOICES)
def test_trained_tensors_load_onto_the_base(make_model, tune, tmp_path):
    model = make_model(tune=tune)
    train(model)
    torch.save(trained_state(model), tmp_path / "trained.pt")
    saved = read_checkpoint(tmp_path / "trained.pt")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names <= saved.keys() and (tune == "full" or saved.keys() == names)
    other = make_model(tune=tune)
    assert not torch.allclose(predictions(other), predictions(model), atol=1e-3)
    load_trained(other, saved, "trained.pt")
    assert torch.equal(predictions(other), predictions(model))
    with pytest.raises(InputError, match="not those"):
        load_trained(make_model(tune="lora", lora_rank=3), saved, "trained.pt")


def test_lora_is_its_definition_and_merges():
    torch.manual_seed(0)
    linear = LoRALinear(make_llama().layers[0].feed_forward.w1, rank=4, alpha=12.0, dropout=0.0)
    torch.nn.init.normal_(linear.lora_b)
    x = torch.randn(5, 9, 32)
    w, a, b = (t.detach().double() for t in (linear.weight, linear.lora_a, linear.lora_b))
    expected = x.double() @ w.T + 12 / 4 * (x.double() @ a.T @ b.T)
    assert torch.allclose(linear(x).double(), expected, atol=1e-4)
    assert torch.allclose(linear.merged()(x).double(), expected, atol=1e-4)


def test_lora_drops_inputs_of_the_update_in_training_only():
    torch.manual_seed(0)
    linear = LoRALinear(make_llama().layers[0].feed_forward.w1, 4, 12.0, dropout=0.5)
    x = torch.randn(5, 9, 32)
    assert torch.equal(linear(x), linear(x))  # B is zero
    torch.nn.init.normal_(linear.lora_b)
    assert not torch.equal(linear(x), linear(x))
    linear.eval()
    assert torch.equal(linear(x), linear(x))


def test_merged_lora_predicts_the_same(make_model):
    model = make_model(tune="lora")
    train(model)
    expected = predictions(model)
    merge_lora(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert (predictions(model) - expected).abs().max() < 1e-5


def test_loras_gradient_reaches_a_and_b_only(make_model):
    model = make_model(tune="lora")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    model(BATCH["token_ids"], BATCH["lengths"])[:, 0].sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {n for n, _ in model.named_parameters() if "lora_" in n or "head" in n}
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_" in n)


def test_an_adapter_is_its_definition(make_model):
    adapter = make_model(tune="adapter").llama.layers[0].attention.adapter
    torch.nn.init.normal_(adapter.up.weight)
    h = torch.randn(2, 3, 32)
    down, up = (layer.weight.detach().double() for layer in (adapter.down, adapter.up))
    expected = h.double() + torch.relu(h.double() @ down.T) @ up.T
    assert torch.allclose(adapter(h).double(), expected, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_a_prefix_is_more_keys_and_values(causal, n_kv_heads):
    torch.manual_seed(0)
    llama = make_llama(causal=causal, n_kv_heads=n_kv_heads)
    attention = PrefixAttention(llama.layers[0].attention, 5)
    for prefix in (attention.prefix_key, attention.prefix_value):
        torch.nn.init.normal_(prefix)
    query = torch.randn(2, 4, 7, 8)
    key, value = torch.randn(2, 2, n_kv_heads, 7, 8)
    keys, values = (
        torch.cat((p.detach().expand(2, -1, -1, -1), x), dim=2)
        .repeat_interleave(4 // n_kv_heads, dim=1)
        .double()
        for p, x in ((attention.prefix_key, key), (attention.prefix_value, value))
    )
    scores = query.double() @ keys.transpose(-1, -2) / math.sqrt(8)
    if causal:
        hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
        scores[..., 5:] = scores[..., 5:].masked_fill(hidden, -math.inf)
    expected = scores.softmax(-1) @ values
    output = attention.compute_query_key_value_scores(query, key, value)
    assert torch.allclose(output.double(), expected, atol=1e-5)


def test_a_prefix_works_with_a_cache_and_ragged_rows():
    torch.manual_seed(0)
    llama = make_llama(causal=True)
    add_prefix(llama, 4)
    with torch.inference_mode():
        whole = llama.hidden_states(TOKENS[:2])
        cache = KVCache(llama.config, 2, 11)
        llama.hidden_states(TOKENS[:2, :6], cache=cache)
        cache.lengths = [6, 4]
        rows = torch.stack((TOKENS[0, 6:9], TOKENS[1, 4:7]))
        cached = llama.hidden_states(rows, cache=cache)
    assert torch.allclose(cached[0], whole[0, 6:9], atol=1e-4)
    assert torch.allclose(cached[1], whole[1, 4:7], atol=1e-4)


# Mixout


def test_mixout_of_nothing_is_plain_training(make_model):
    plain, mixed = make_model(), make_model()
    add_mixout(mixed.llama, 0.0)
    assert train(plain)[0] == pytest.approx(train(mixed)[0], abs=1e-5)
    for (name, a), b in zip(plain.named_parameters(), mixed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


def test_mixout_acts_on_all_linear_layers_of_the_layers(make_model):
    plain, mixed = make_model(), make_model()
    losses = train(mixed, mixout=0.5)[0]
    assert sum(isinstance(module, MixoutLinear) for module in mixed.modules()) == 2 * 7
    assert losses[1:] != pytest.approx(train(plain)[0][1:], abs=1e-4)


def test_mixout_takes_weights_from_both_and_keeps_the_mean():
    torch.manual_seed(0)
    linear = MixoutLinear(make_llama().layers[0].feed_forward.w1, 0.3)
    with torch.no_grad():
        linear.weight.add_(torch.randn_like(linear.weight))
        mixtures = torch.stack([linear.mixed() for _ in range(4000)])
    weight, pretrained = linear.weight.detach(), linear.pretrained
    from_pretrained = (mixtures - pretrained).abs() < 1e-6
    current = (weight - 0.3 * pretrained) / 0.7  # (W - p·U) / (1 - p)
    assert torch.allclose(
        mixtures[~from_pretrained], current.expand_as(mixtures)[~from_pretrained], atol=1e-5
    )
    assert from_pretrained.float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert (mixtures.mean(0) - weight).abs().max() < 0.06 * (weight - pretrained).abs().max()
    x = torch.randn(10, 32)
    assert torch.equal(linear.eval()(x), linear(x))
    assert torch.allclose(linear(x), x @ weight.T, atol=1e-5)


def test_mixout_needs_weights_that_train(make_model):
    with pytest.raises(InputError, match="--tune lora"):
        make_recipe(make_model(tune="lora"), mixout=0.5, tune="lora")


# SMART


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
    assert train(smooth, **flags)[0] == pytest.approx(train(plain)[0], abs=1e-5)


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
    model, average = make_model(), make_model(hidden_dropout_prob=0.0)
    flags = {"smart_radius": 0.5, "smart_step_size": 0.3, "smart_noise": 0.02, "smart_mu": 0.7}
    smart = make_recipe(model, smart=3.0, **flags).loss
    with torch.no_grad():
        model.classifier_head.weight.mul_(3).add_(0.1)
    unit = average.llama.tok_embeddings.weight.std().item()

    def log_probs(classifier, row, change=0.0):
        handle = classifier.llama.tok_embeddings.register_forward_hook(lambda *c: c[-1] + change)
        output = classifier(BATCH["token_ids"][row : row + 1], BATCH["lengths"][row : row + 1])
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
        expected += -log_p[0, BATCH["labels"][row]]
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
    halves = [{name: x[rows] for name, x in BATCH.items()} for rows in (slice(4), slice(4, 6))]
    whole = recipe.loss(BATCH, model).item()
    assert whole > 1.1 * recipe.loss.loss(BATCH, model).item()
    assert sum(recipe.loss(half, model).item() for half in halves) == pytest.approx(whole, rel=1e-4)


def test_the_perturbation_stays_in_its_ball_and_ascends(make_model):
    model = make_model()
    smart = make_recipe(model, smart=1.0, smart_radius=0.5, smart_step_size=0.2, smart_steps=4).loss
    assert isinstance(smart, Smart)
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
        smart.averaged(BATCH["token_ids"], BATCH["lengths"]), predictions(average), atol=1e-5
    )


def test_smart_and_mixout_go_with_checkpointed_activations(make_model):
    results = []
    for checkpointing in (False, True):
        model = make_model(hidden_dropout_prob=0.2)
        if checkpointing:
            checkpoint_activations(model.llama.layers)
        torch.manual_seed(0)
        losses, *_ = train(model, smart=1.0, mixout=0.4)
        results.append((losses, snapshot(model)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    for name, tensor in results[0][1].items():
        assert torch.allclose(tensor, results[1][1][name], atol=1e-4), name


# WiSE-FT


def test_mixed_weights_are_between_and_exact_at_both_ends(make_model):
    model = make_model()
    start = snapshot(model)
    train(model)
    end = snapshot(model)
    for alpha, expected in ((0.0, start), (1.0, end)):
        mix(model, start, end, alpha)
        for name, tensor in snapshot(model).items():
            assert torch.equal(tensor, expected[name]), name
    mix(model, start, end, 0.25)
    for name, tensor in snapshot(model).items():
        assert torch.allclose(tensor, 0.75 * start[name] + 0.25 * end[name], atol=1e-6)


def test_the_best_mixture_on_dev_is_kept(make_model, capsys):
    model = make_model()
    recipe = make_recipe(model, wise_ft=[1.0, 0.0, 0.5])
    start = snapshot(model)
    embedding = model.llama.tok_embeddings.weight
    assert torch.allclose(model.classifier_head.weight[1], embedding[[6, 7]].mean(0))
    assert not model.classifier_head.bias.any()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    accuracies = iter([0.2, 0.6, 0.4])
    args = dict(vars(recipe), evaluate=lambda: next(accuracies), after_step=[], finish=[])
    recipe = Recipe(**args)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])
    methods.prepare(recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    recipe.finish[0]()
    assert "keep alpha 0.5" in capsys.readouterr().out
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, start[name] + 0.5, atol=1e-5), name


@pytest.mark.parametrize("tune", ["lora", "adapter", "prefix"])
def test_what_cannot_be_mixed_is_refused(make_model, tune):
    with pytest.raises(InputError, match="--wise_ft"):
        make_recipe(make_model(tune=tune), tune=tune, wise_ft=[0.5])


# Learning rates


def test_warmup_and_decay():
    rates = [warmup_decay(step, 10, 3, "linear") for step in range(11)]
    assert rates == pytest.approx(
        [1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0]
    )
    assert warmup_decay(5, 10, 0, "cosine") == pytest.approx(0.5)
    assert [warmup_decay(step, 10, 0, "constant") for step in range(3)] == [1, 1, 1]


def test_the_rates_are_set_before_every_step(make_model):
    model = make_model()
    recipe = make_recipe(model, 4, lr_schedule="linear", warmup=0.25, lr=0.5)
    optimizer, rates = AdamW(recipe.groups, lr=0.5), []
    step = optimizer.step
    optimizer.step = lambda: (rates.append(optimizer.param_groups[0]["lr"]), step())
    for epoch in range(2):
        train_epoch(model, [BATCH, BATCH], optimizer, recipe.loss, epoch, 1, recipe.after_step)
    assert rates == pytest.approx([0.25, 0.5, 0.5 * 2 / 3, 0.5 / 3])


def test_rates_go_down_by_layer(make_model):
    model = make_model()
    rates = {
        id(p): group["lr"] for group in groups_by_depth(model, 1.0, 0.5) for p in group["params"]
    }
    assert len(rates) == len(list(model.parameters()))
    expected = {
        "classifier_head": 1,
        "llama.norm": 1,
        "llama.layers.1.": 0.5,
        "llama.layers.0.": 0.25,
    }
    for name, parameter in model.named_parameters():
        rate = next((r for start, r in expected.items() if name.startswith(start)), 0.125)
        assert rates[id(parameter)] == rate, name


# Pooling


@pytest.mark.parametrize("causal", [False, True])
def test_pooling_reads_real_tokens_only(make_model, causal):
    hidden = make_model(causal=causal).llama.hidden_states(TOKENS)
    for pooling in ("last", "mean"):
        model = make_model(pooling=pooling, causal=causal)
        rows = [h[:n] for h, n in zip(hidden, BATCH["lengths"].tolist(), strict=True)]
        pooled = torch.stack([row[-1] if pooling == "last" else row.mean(0) for row in rows])
        expected = F.log_softmax(model.classifier_head(pooled), dim=-1)
        assert torch.allclose(predictions(model), expected, atol=1e-5)


# Prompts


def test_prompt_based_predictions_are_normalized_zero_shot_scores(make_model, tmp_path, tokenizer):
    model = make_model(prompt_based=True)
    zero_shot = LlamaZeroShotClassifier(config_of(tmp_path / "z.pt"), tokenizer, NAMES)
    expected = predictions(zero_shot).softmax(-1)
    assert torch.allclose(predictions(model).exp(), expected, atol=1e-5)


def test_prompt_based_gradients_are_those_without_a_cache(make_model, tokenizer):
    """Each label's tokens appended to each prompt, alone in a batch."""
    model = make_model(prompt_based=True)
    value = F.nll_loss(model(BATCH["token_ids"], BATCH["lengths"]), BATCH["labels"])
    ours = torch.autograd.grad(value, list(model.llama.parameters()))
    rows = []
    for prompt, length in zip(BATCH["token_ids"].tolist(), BATCH["lengths"].tolist(), strict=True):
        scores = []
        for name in NAMES:
            ids = tokenizer.encode(name, bos=False, eos=False)
            tokens = torch.tensor([prompt[:length] + ids])
            log_probs = model.llama(tokens, targets=tokens)[0][0].log_softmax(-1)
            scores.append(sum(log_probs[length + i - 1, token] for i, token in enumerate(ids)))
        rows.append(torch.stack(scores))
    other = F.cross_entropy(torch.stack(rows), BATCH["labels"])
    assert value.item() == pytest.approx(other.item(), abs=1e-4)
    for a, b in zip(ours, torch.autograd.grad(other, list(model.llama.parameters())), strict=True):
        assert torch.allclose(a, b, atol=1e-3 * b.abs().max().item() + 1e-5)


def test_prompt_based_training_goes_with_checkpointed_activations(make_model):
    """Where no label has several tokens, so that no cache is used."""
    gradients = []
    for checkpointing in (False, True):
        model = make_model(prompt_based=True)
        model.label_name_ids = [[5], [6], [8]]
        assert not model.uses_cache
        if checkpointing:
            checkpoint_activations(model.llama.layers)
        model.train()
        value = F.nll_loss(model(BATCH["token_ids"], BATCH["lengths"]), BATCH["labels"])
        gradients.append(torch.autograd.grad(value, list(model.llama.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * a.abs().max().item())


def test_few_shots_are_so_many_of_each_label():
    data = [(str(i), i % 3, [i]) for i in range(30)]
    chosen = few_shot(data, 4, 3, seed=1)
    assert sorted(label for _, label, _ in chosen) == [0] * 4 + [1] * 4 + [2] * 4
    assert chosen == few_shot(data, 4, 3, seed=1) != few_shot(data, 4, 3, seed=2)
    with pytest.raises(InputError, match="label 0 has 10 sentences"):
        few_shot(data, 11, 3, seed=1)


def test_a_template_stands_around_the_sentence_however_short_it_was_cut(tokenizer, tokenizer_path):
    data = [("the plot is thin", 1, tokenizer.encode("the plot is thin", True, False)[:3])]
    template = "Film : {sentence} Is it {labels} ?  "
    ((text, label, ids),) = make_prompts(data, template, ["bad", "good"], tokenizer, causal=True)
    assert (text, label) == ("Film : the plot is thin Is it bad or good ?", 1)
    head, tail = (
        tokenizer.encode(part, False, False) for part in ("Film :", "Is it bad or good ?")
    )
    assert ids == [1, *head, *data[0][2][1:], *tail]
    ((text, _, ids),) = make_prompts(data, template, ["bad", "good"], tokenizer, causal=False)
    assert text == "Film : the plot is thin Is it bad or good ?  "
    assert ids == tokenizer.encode(text, True, False)


@pytest.mark.parametrize("template", ["no sentence", "{sentence} and {sentence}"])
def test_a_template_has_one_sentence(template, tokenizer):
    with pytest.raises(InputError, match="--prompt_template"):
        make_prompts([], template, NAMES, tokenizer, causal=True)


@pytest.mark.parametrize("method", ["contextual", "pmi"])
def test_calibration_divides_out_the_prior(method, tmp_path, tokenizer):
    model = LlamaZeroShotClassifier(config_of(tmp_path / "z.pt"), tokenizer, NAMES)
    model.llama.config.dropout = 0.5
    for layer in model.llama.layers:
        layer.feed_forward.dropout.p = 0.5
    template = "{sentence} It is"
    calibrated = Calibrated(model, method, template, NAMES, tokenizer)

    def probabilities(sentence):
        data = [(sentence, 0, tokenizer.encode(sentence, True, False))]
        ((_, _, ids),) = make_prompts(data, template, NAMES, tokenizer, causal=True)
        with torch.inference_mode():
            return model(torch.tensor([ids]), torch.tensor([len(ids)])).softmax(-1)[0]

    texts = ("N/A", "[MASK]", "") if method == "contextual" else ("",)
    prior = torch.stack([probabilities(text) for text in texts]).mean(0)
    expected = (probabilities("a thin plot") / prior).log()
    data = [("a thin plot", 0, tokenizer.encode("a thin plot", True, False))]
    ((_, _, ids),) = make_prompts(data, template, NAMES, tokenizer, causal=True)
    scores = calibrated(torch.tensor([ids]), torch.tensor([len(ids)]))[0]
    difference = scores - expected
    assert torch.allclose(difference, difference.mean().expand(3), atol=1e-4)
    if method == "pmi":  # the prompt alone says nothing about the labels
        alone = tokenizer.encode("It is", False, False)
        scores = calibrated(torch.tensor([[1, *alone]]), torch.tensor([1 + len(alone)]))[0]
        assert torch.allclose(scores, scores.mean().expand(3), atol=1e-4)


def test_a_long_content_free_prompt_is_cut_to_the_context(tmp_path, tokenizer):
    """From its left, as the prompts that are scored."""
    model = LlamaZeroShotClassifier(config_of(tmp_path / "z.pt"), tokenizer, NAMES)
    template = "{sentence} " + "a film about a film " * 40
    with pytest.warns(UserWarning, match="1 of 1 rows do not fit"):
        calibrated = Calibrated(model, "pmi", template, NAMES, tokenizer)
    ids = tokenizer.encode(template.removeprefix("{sentence} ").strip(), False, False)
    assert len(ids) > model.max_prompt_len
    cut = torch.tensor([[1, *ids[1 - model.max_prompt_len :]]])
    with torch.inference_mode():
        expected = model(cut, torch.tensor([cut.shape[1]])).log_softmax(-1)[0]
    assert torch.allclose(calibrated.prior, expected, atol=1e-4)
