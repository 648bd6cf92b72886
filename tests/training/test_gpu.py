"""The loops on a GPU: on CUDA where there is one, and everywhere on tensors without memory.

On the "meta" device, as on CUDA, a tensor of the CPU's among the others is an error. So is whatever
waits for a result, such as `item()`. A run is interrupted there before its first report.
"""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, interrupted_at
from torch.optim.optimizer import register_optimizer_step_pre_hook

import minllama.methods.classify
import minllama.tasks.pretrain
import run_llama
from minllama.training import run
from minllama.training.run_folder import RunFolder

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TEXT = ["--option", "pretrain", "--text", "text.txt", "--vocab_size", "300", "--dim", "16"]
TEXT += ["--n_layers", "2", "--n_heads", "2", "--max_seq_len", "16", "--steps", "10"]
TEXT += ["--eval_every", "5"]
DATA = {split: f"data/toy-{split}.txt" for split in ("train", "dev", "test")}
ARGS = {"pretrained_model_path": "model.pt", "option": "finetune", "filepath": "w.pt", **DATA}


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = (f"{SENTENCES[i % 6]}, said {i % 7} of {i % 11}.\n" for i in range(600))
    Path("text.txt").write_text("<|endoftext|>\n".join(lines))


@pytest.mark.parametrize("flags", [[], ["--activation_checkpointing", "--grad_accum", "2"]])
def test_steps_of_pretraining_stay_on_the_device_and_wait_for_nothing(
    text, run_cli, monkeypatch, flags
):
    monkeypatch.setattr(minllama.tasks.pretrain, "best_device", lambda: torch.device("meta"))
    monkeypatch.setattr(RunFolder, "start_or_resume", lambda *_: (0, 1e9, 0.0))
    with interrupted_at(3):
        assert run_cli(*TEXT, *flags)[0] == 130


@pytest.mark.parametrize("flags", [{}, {"causal": True, "tune": "lora"}, {"mixout": 0.5}])
def test_steps_of_finetuning_stay_on_the_device_and_wait_for_nothing(project, monkeypatch, flags):
    monkeypatch.setattr(minllama.methods.classify, "pick_device", lambda _: torch.device("meta"))
    monkeypatch.setattr(run, "rng_state", lambda *_: {})
    with interrupted_at(3), pytest.raises(KeyboardInterrupt):
        run_llama.train(Namespace(**ARGS, batch_size=4, epochs=1, **flags))


@cuda
@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_cuda_trains_as_the_cpu_does(text, run_cli, monkeypatch, flags):
    losses = []
    for device, more in (("cpu", []), ("cuda", flags)):
        monkeypatch.setattr(
            minllama.tasks.pretrain, "best_device", lambda d=device: torch.device(d)
        )
        assert run_cli(*TEXT, *more, "--output_dir", device)[0] == 0
        reports = Path(device, "metrics.jsonl").read_text().splitlines()[:-1]
        losses += [[json.loads(line)["train"]["loss"] for line in reports]]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_is_not_waited_for(text, run_cli, dtype):
    """From the second step to the fourth, before the first report."""
    modes = iter(["default", "error", "error", "default"])

    def set_mode(*_) -> None:
        torch.cuda.set_sync_debug_mode(next(modes, "default"))

    hook = register_optimizer_step_pre_hook(set_mode)
    code, _, err = run_cli(*TEXT, "--dtype", dtype, "--eval_every", "10")
    hook.remove()
    assert code == 0, err
