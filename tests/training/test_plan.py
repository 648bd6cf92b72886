"""The plan of a training: against formulas, real tensors, and the memory of a real process."""

import math
import sys

import pytest
import torch

from benchmarks.plan import SMALL, measured
from checkpoints.layout import HEAD, shapes_of
from common.errors import InputError
from common.program import run_script
from llama import Llama
from tasks.scores import NextTokenScores
from training.checkpointing import checkpoint_activations
from training.cpu import accelerate
from training.plan import LiveBytes, PlanSettings, advice, main, make_plan, savings
from training.step import mixed_precision

TINY = PlanSettings(
    vocab_size=300, dim=32, n_layers=2, n_heads=4, hidden_dim=48, context=16, device="cpu"
)


def n_weights(settings: PlanSettings) -> int:
    """Counted from the shapes that the formats of checkpoints know."""
    config = settings.config()
    shapes = shapes_of(config)
    if config.tie_embeddings:
        del shapes[HEAD]
    return sum(math.prod(shape) for shape in shapes.values())


def sent_around_a_ring(n: int, n_bytes: int) -> int:
    """What one of n sends in a reduce-scatter or an all-gather: each piece but one, once."""
    pieces = [n_bytes // n] * n
    return sum(pieces[1:])


@pytest.mark.parametrize(
    ("shape", "expected"), [("42m", 41_689_600), ("1.1b", 1_100_048_384), ("7b", 6_738_415_616)]
)
def test_known_shapes_have_as_many_weights_as_published(shape, expected):
    assert n_weights(PlanSettings(shape=shape)) == expected


def test_every_gpu_holds_all_without_shards():
    plan = make_plan(TINY.replace(gpus=4))
    n = n_weights(TINY)
    assert plan.n_weights == n
    assert (plan.weights, plan.gradients, plan.optimizer) == (4 * n, 4 * n, 8 * n)
    assert plan.gathered == 0
    assert plan.in_machine == pytest.approx(2 * sent_around_a_ring(4, 4 * n), abs=4)
    assert plan.between_machines == 0
    plan = make_plan(TINY.replace(gpus=4, gpus_per_machine=2, grad_accum=3))
    assert plan.in_machine == 0
    assert plan.between_machines == pytest.approx(2 * sent_around_a_ring(4, 4 * n), abs=4)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_shards_lie_within_a_machine(dtype, width):
    settings = TINY.replace(gpus=8, gpus_per_machine=4, shard=True, dtype=dtype, grad_accum=3)
    plan = make_plan(settings)
    n = n_weights(settings)
    of_layers = n - 300 * 32 - 32  # without the tied matrix and the last norm
    assert plan.weights == plan.gradients == n  # 4 bytes of a quarter
    assert plan.optimizer == 2 * n
    assert plan.gathered == width * n  # both of two layers
    gathered = sent_around_a_ring(4, n * width) + sent_around_a_ring(4, of_layers * width)
    assert plan.in_machine == 3 * (gathered + sent_around_a_ring(4, 4 * n))
    assert plan.between_machines == 2 * sent_around_a_ring(2, n)


def test_one_gpu_sends_nothing():
    plan = make_plan(TINY)
    assert plan.in_machine == plan.between_machines == 0


def test_live_bytes_are_those_of_tensors_in_use():
    known = torch.ones(250)
    with LiveBytes([known]) as memory:
        a = known * 2
        b = known + a.view(10, 25).sum()  # the sum is gone at once
        assert memory.live == 2000
        del a
        assert memory.live == 1000
        b.mul_(2)
        view = b[:10]
        del b
        assert memory.live == 1000
        del view
        assert memory.live == 0
        aside = known + 1
        memory.set_aside(aside)
        assert memory.live == 0
        c = torch.ones(375)
        del aside, c
    assert memory.live == 0
    assert memory.peak == 2004
    assert memory.peak_of_all == 2500


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"dtype": "bfloat16"},
        {"activation_checkpointing": True},
        {"grad_accum": 2},
        {"n_kv_heads": 2, "tie_embeddings": False, "batch_size": 6},
    ],
    ids=str,
)
def test_plan_on_a_cpu_equals_a_step_of_pretraining_with_real_tensors(flags):
    settings = TINY.replace(**{"batch_size": 4, **flags})
    plan = make_plan(settings)
    llama = Llama(settings.config())
    accelerate(llama)
    if settings.activation_checkpointing:
        checkpoint_activations(llama.layers)
    tokens = torch.randint(300, (settings.rows, 16))
    llama.hidden_states(tokens)  # makes the table of rotations
    with LiveBytes([tokens, *llama.parameters()]) as memory:
        for _ in range(settings.grad_accum):
            with mixed_precision(torch.device("cpu"), settings.dtype):
                logits = llama.output(llama.hidden_states(tokens))
            scores = NextTokenScores(logits, tokens, bos_id=1)
            del logits
            scores.loss.backward()
    expected = memory.peak + plan.weights + plan.optimizer
    table = 16 * 4 * 8  # of rotations, and what it is made from
    assert plan.total == pytest.approx(expected, abs=4 * table)


@pytest.mark.parametrize("context", [16, 1024])
def test_a_layer_keeps_on_a_gpu_what_its_kernels_need(context):
    rows, d, f, n_heads = 2, 32, 48, 4
    settings = TINY.replace(device="cuda", context=context, gpus=2, batch_size=2 * rows)
    of_a_layer = (
        make_plan(settings.replace(n_layers=3)).activations - make_plan(settings).activations
    )
    # Inputs of both norms and their outputs, query, key, value and the attended values; w1 x, its
    # SiLU, w3 x and their product; a number for each query and each norm.
    per_token = 8 * d + 4 * f + n_heads + 2
    assert of_a_layer == 4 * rows * context * per_token


def test_the_optimizer_is_part_of_the_plan_on_a_gpu():
    plan = make_plan(TINY.replace(device="cuda", context=1))
    n = n_weights(TINY)
    assert plan.temporary == 4 * n  # the denominators
    assert plan.total == 5 * 4 * n


def test_real_models_run_before_and_after_a_plan():
    llama, tokens = Llama(TINY.config()), torch.zeros(1, 16, dtype=torch.long)
    before = llama.hidden_states(tokens)
    make_plan(TINY)
    torch.testing.assert_close(llama.hidden_states(tokens), before, rtol=0, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_plan_is_within_15_percent_of_a_process():
    settings = PlanSettings(**SMALL, context=256, batch_size=4, device="cpu")
    assert make_plan(settings).total == pytest.approx(measured(settings, threads=1), rel=0.15)


def test_what_would_lower_the_memory_does():
    settings = TINY.replace(gpus=2, batch_size=24, device="cuda", context=256)
    before, names = make_plan(settings).total, []
    for name, changes in savings(settings):
        names.append(name)
        settings = settings.replace(**changes)
        total = make_plan(settings).total
        assert total < before
        before = total
    assert names == [
        "--shard",
        "--activation_checkpointing",
        "--dtype bfloat16",
        "--batch_size 12 --grad_accum 2",
        "--batch_size 6 --grad_accum 4",
        "--batch_size 2 --grad_accum 12",
    ]


def test_advice_ends_when_it_fits():
    settings = TINY.replace(gpus=2, batch_size=4, context=64)
    plan = make_plan(settings)
    assert "".join(advice(settings, plan)) == "It fits in 80 GiB."
    small = settings.replace(gpu_memory=(plan.total - 1) / 2**30)
    first, *lines = advice(small, plan)
    assert "does not fit" in first
    assert len(lines) == 1
    assert "--shard" in lines[0]
    assert "not enough" in list(advice(settings.replace(gpu_memory=0.0), plan))[-1]


def test_report(monkeypatch, capsys):
    flags = "--dim 32 --n_layers 2 --n_heads 4 --vocab_size 300 --context 16 --gpus 4 --shard"
    monkeypatch.setattr(sys, "argv", ["plan", *flags.split(), "--grad_accum", "2"])
    main()
    text = capsys.readouterr().out
    assert "4 GPUs, float32" in text
    assert "a batch: 4 x 16 tokens, 1 x 16 on each GPU; a step: 128 tokens" in text
    assert text.endswith("It fits in 80 GiB.\n")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("", "--shape"),
        ("--shape 9b", "--shape"),
        ("--shape 42m --gpus 12", "--gpus_per_machine 8"),
        ("--shape 42m --gpus 4 --batch_size 6", "--batch_size 6"),
        ("--shape 42m --shard", "--shard"),
        ("--shape 42m --n_heads 7", "no such model"),
        ("--shape 42m --gpus 0", "--gpus 0"),
        ("--shape 42m --gpu_memory nan", "--gpu_memory"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, flags, complaint):
    monkeypatch.setattr(sys, "argv", ["plan", *flags.split()])
    with pytest.raises(SystemExit) as ending:
        run_script(main)
    assert ending.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert complaint in error
    assert error.count("\n") == 1


def test_settings_are_checked_by_the_plan_too():
    with pytest.raises(InputError, match="--gpus 12"):
        make_plan(TINY.replace(gpus=12))
