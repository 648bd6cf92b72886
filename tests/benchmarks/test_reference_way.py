"""What the benchmarks compare must be the same work."""

import contextlib
import copy
from unittest import mock

import torch
from conftest import make_llama, save_llama

import rope
from benchmarks.reference_way import (
    make_reference_loader,
    model_eval_with_autograd,
    reference_way,
)
from classifier import LlamaEmbeddingClassifier
from minllama.evaluation.classification import model_eval
from minllama.kernels.cpu import accelerate
from minllama.methods.saved import ClassifierConfig
from minllama.text.batches import make_loader
from minllama.text.labelled import create_data
from optimizer import AdamW


def test_the_references_way_predicts_the_same(project, tokenizer):
    config = ClassifierConfig(
        pretrained_model_path=str(save_llama(make_llama(), project.path / "m.pt")),
        num_labels=3,
        option="finetune",
        hidden_dropout_prob=0.1,
    )
    model = LlamaEmbeddingClassifier(config)
    fast = copy.deepcopy(model)
    accelerate(fast)
    data = create_data("data/toy-dev.txt", tokenizer, "valid", eos=False)
    loader = make_loader(data, 4, tokenizer.pad_id, causal=False)
    batch = next(iter(loader))
    with torch.inference_mode():
        ours = fast.eval()(batch.token_ids)
    with reference_way():
        theirs = model.eval()(batch.token_ids)
        cpu = torch.device("cpu")
        its_loader = make_reference_loader(data, 4, tokenizer)
        its_results = model_eval_with_autograd(its_loader, model, cpu)
    assert its_results == model_eval(loader, fast, cpu)
    assert theirs.requires_grad
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_reference_computes_everything_anew():
    """A table of rotations in every layer, and in the last layer the states of all positions."""
    llama = make_llama(n_layers=3)
    last = torch.tensor([[2]])
    shapes = []
    llama.layers[-1].feed_forward.register_forward_hook(
        lambda module, args, output: shapes.append(tuple(output.shape[:2]))
    )
    rope.rotary_table.cache_clear()
    for way in (contextlib.nullcontext, reference_way):
        with way(), mock.patch.object(torch, "polar", side_effect=torch.polar) as polar:
            for _ in range(2):
                llama.hidden_states(torch.tensor([[1, 5, 7]]), last)
        shapes.append(polar.call_count)
    assert shapes == [(1, 1), (1, 1), 1, (1, 3), (1, 3), 6]


def test_the_reference_tokenizes_at_every_use(project, tokenizer):
    data = create_data("data/toy-train.txt", tokenizer, "valid", eos=False)
    torch.manual_seed(0)
    ours = list(make_loader(data, 5, tokenizer.pad_id, causal=False, shuffle=True))
    with mock.patch.object(tokenizer, "encode", wraps=tokenizer.encode) as encode:
        torch.manual_seed(0)
        loader = make_reference_loader(data, 5, tokenizer, shuffle=True)
        theirs = list(loader)
        list(loader)
    encoded = sorted(call.args[0] for call in encode.call_args_list)
    assert encoded == sorted(2 * [sentence for sentence, _, _ in data])
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.sents == its.sents
        assert torch.equal(mine.labels, its.labels)
        assert torch.equal(mine.token_ids, its.token_ids)


def test_the_references_optimizer_takes_the_same_step():
    steps = {}
    for way in (contextlib.nullcontext, reference_way):
        model = make_llama()
        optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        with way():
            for _ in range(3):
                model(torch.tensor([[1, 5, 7]]))[0].square().mean().backward()
                optimizer.step()
        steps[way] = model.state_dict()
    ours, theirs = steps.values()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-6), name
