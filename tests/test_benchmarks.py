"""What the benchmarks compare must be the same work."""

from types import SimpleNamespace

import torch
from conftest import make_llama, save_llama

from benchmarks.reference_way import model_eval_with_autograd, reference_way
from classifier import LlamaEmbeddingClassifier
from dataset import create_data
from evaluation import model_eval
from batching import make_loader


def test_the_references_way_predicts_the_same(project, tokenizer):
    args = SimpleNamespace(max_sentence_len=None, batch_size=4)
    config = SimpleNamespace(
        pretrained_model_path=save_llama(make_llama(), project.path / "m.pt"),
        num_labels=3,
        option="finetune",
        hidden_dropout_prob=0.1,
    )
    model = LlamaEmbeddingClassifier(config)
    loader = make_loader(
        create_data("data/toy-dev.txt", tokenizer, "valid", eos=False), model, args
    )
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
