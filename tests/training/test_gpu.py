"""The path on a GPU: on CUDA where there is one, and everywhere on tensors without memory.

On the "meta" device a tensor of the CPU's among the others is an error, as it is on CUDA; so is
whatever waits for a result, such as `item()`.
"""

import pytest
import torch
from conftest import make_llama
from torch import nn

from classifier import LlamaEmbeddingClassifier
from minllama.evaluation.language_model import NextTokenScores
from minllama.kernels.cpu import accelerate
from minllama.methods.lora import LoRA
from minllama.tasks.epoch import ClassificationLoss, LossOfModel, losses_of
from minllama.text.batches import Batch
from minllama.training.activation_checkpointing import checkpoint_activations
from minllama.training.step import compile_layers, mixed_precision, update
from optimizer import AdamW

META = torch.device("meta")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def moved(llama: nn.Module, device: torch.device) -> None:
    """Move a Llama. On "meta", other than on real devices, shared weights would become two."""
    llama.to(device)
    llama.tok_embeddings.weight = llama.output.weight


def pretraining_step(device: torch.device, dtype: str = "float32", **prepare) -> tuple:
    llama = make_llama(causal=True, scale=1.0).train()
    accelerate(llama)
    if prepare.get("checkpointing"):
        checkpoint_activations(llama.layers)
    moved(llama, device)
    if prepare.get("compiled"):
        compile_layers(llama.layers)
    optimizer = AdamW(llama.parameters(), lr=1e-3)
    ids = torch.arange(60).view(2, 30).to(device)

    def losses():
        with mixed_precision(device, dtype):
            logits, _ = llama(ids[:, :-1], ids[:, 1:])
        yield NextTokenScores(logits, ids[:, 1:], bos_id=1).loss

    return llama, lambda i: update(llama, losses(), optimizer, f"step {i}", max_norm=1.0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_pretraining_stays_on_its_device(checkpointing):
    llama, step = pretraining_step(META, checkpointing=checkpointing)
    assert step(0).device == META
    assert all(parameter.grad.device == META for parameter in llama.parameters())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
def test_a_step_of_finetuning_stays_on_its_device(monkeypatch, lora, lengths):
    llama = make_llama(causal=lengths)
    monkeypatch.setattr("classifier.load_backbone", lambda config: llama)
    config = type("Config", (), {"num_labels": 3, "hidden_dropout_prob": 0.3, "option": "finetune"})
    model = LlamaEmbeddingClassifier(config)
    accelerate(model)
    if lora:
        LoRA().adapt(model)
    model = model.to(META).train()
    moved(llama, META)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch = Batch(torch.ones(4, 9, dtype=torch.int64), torch.tensor([0, 1, 2, 0]), [])
    if lengths:
        batch.lengths = torch.tensor([9, 8, 7, 3])
    spread = LossOfModel(ClassificationLoss(4, META, "float32"), model)
    losses = losses_of([batch, batch], spread, grad_accum=2)
    assert update(model, losses, AdamW(trained, lr=1e-3), "step 0").device == META
    assert all(parameter.grad.device == META for parameter in trained)


@cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_trains_as_the_cpu_does(compiled):
    results = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        llama, step = pretraining_step(device, compiled=compiled and device.type == "cuda")
        losses = [step(i).item() for i in range(5)]
        weights = torch.cat([p.detach().cpu().flatten() for p in llama.parameters()])
        results.append((losses, weights))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-3)
    assert (results[1][1] - results[0][1]).abs().max() < 1e-3


@cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_is_not_waited_for(dtype):
    _, step = pretraining_step(torch.device("cuda"), dtype)
    step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
