"""The fast AdamW is the textbook's, bit for bit."""

import pytest
import torch

from minllama.kernels.adamw import FastAdamW, update
from optimizer import AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("correct_bias", [True, False])
def test_equals_the_textbook_loop(monkeypatch, weight_decay, correct_bias):
    """Parameters of several blocks, late and strided ones."""
    monkeypatch.setattr("minllama.kernels.adamw.BLOCK", 7)
    shapes = [(5, 4), (2,), (), (3, 0), (6, 3), (4,), (1,), (1,), (30,)]
    results = []
    for cls in (AdamW, FastAdamW):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        params[4] = torch.nn.Parameter(torch.randn(3, 6).t())  # not contiguous
        groups = [{"params": params[:5]}, {"params": params[5:], "lr": 0.5, "eps": 1e-2}]
        optimizer = cls(
            groups,
            lr=0.01,
            betas=(0.8, 0.95),
            eps=1e-3,
            weight_decay=weight_decay,
            correct_bias=correct_bias,
        )
        for step in range(6):
            for i, p in enumerate(params):
                p.grad = None if i == 5 and step < 2 else torch.randn(p.shape)
            optimizer.step()
        results.append([p.detach() for p in params])
    for textbook, fast in zip(*results, strict=True):
        assert torch.equal(textbook, fast)


def test_blocks_are_updated_together_as_one_by_one():
    """A GPU takes all blocks of a group at once."""
    group = {"betas": (0.8, 0.95), "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1}
    torch.manual_seed(0)
    blocks = [(tuple(torch.rand(n) for _ in range(4)), 0.1 * n) for n in (3, 1, 5)]
    together = [(tuple(tensor.clone() for tensor in block), size) for block, size in blocks]
    update(together, group)
    for block, (expected, _) in zip(blocks, together, strict=True):
        update([block], group)
        assert all(map(torch.equal, block[0], expected))


def test_state_goes_from_one_to_the_other():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    plain = AdamW([p], lr=0.1)
    plain.step()
    fast = FastAdamW([p], lr=0.1)
    fast.load_state_dict(plain.state_dict())
    fast.step()
    assert fast.state[p]["step"] == 2


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        FastAdamW(embedding.parameters()).step()
