"""The device that is picked."""

import pytest
import torch

from minllama.common.errors import InputError
from utils import pick_device


def test_use_gpu_picks_cuda_then_mps_and_else_refuses(monkeypatch):
    assert pick_device(False) == torch.device("cpu")
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device(True).type == expected
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="neither"):
        pick_device(True)
