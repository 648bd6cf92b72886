"""What the benchmarks compare must be the same work."""

import contextlib
from types import SimpleNamespace

import torch
from conftest import make_llama, save_llama

from batching import make_loader
from benchmarks.reference_way import model_eval_with_autograd, reference_way
from classifier import LlamaEmbeddingClassifier
from dataset import create_data
from evaluation import model_eval
from optimizer import AdamW


def test_the_references_way_predicts_the_same(project, tokenizer):
    args = SimpleNamespace(max_sentence_len=None, batch_size=4)
    config = SimpleNamespace(
        pretrained_model_path=save_llama(make_llama(), project.path / "m.pt"),
        num_labels=3,
        option="finetune",
        hidden_dropout_prob=0.1,
    )
    model = LlamaEmbeddingClassifier(config)
    data = create_data("data/toy-dev.txt", tokenizer, "valid", eos=False)
    loader = make_loader(data, args, causal=False)
    batch = next(iter(loader))
    with torch.inference_mode():
        ours = model.eval()(batch["token_ids"])
    with reference_way():
        theirs = model(batch["token_ids"])
        assert model_eval_with_autograd(loader, model, torch.device("cpu")) == model_eval(
            loader, model, torch.device("cpu")
        )
    assert theirs.requires_grad
    assert torch.allclose(ours, theirs, atol=1e-6)


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
