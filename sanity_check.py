"""Check the model against independent values; run as a script.

With `stories42M.pt` they are the reference's: two rows of ids, no mask. Without it they are those
of the demo model, computed by `tests/make_fixtures.py`: once without a mask, once with.
"""

if __name__ == "__main__":  # the imports below take seconds
    from minllama.common.program import end_at_interrupt

    end_at_interrupt()

import sys
from pathlib import Path

import torch

from llama import load_pretrained
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.errors import InputError
from minllama.common.flags import demo_path
from minllama.common.program import ArgumentParser, run_script
from utils import seed_everything

TOKENS = torch.tensor(
    [
        [101, 7592, 2088, 102, 0, 0, 0, 0],
        [101, 7592, 15756, 2897, 2005, 17953, 2361, 102],
    ]
)


def compare(weights: str, causal: bool, tokens: torch.Tensor, expected: dict) -> None:
    """Exit with a line and code 1 if the model does not compute what is expected.

    Args:
        tokens: ids `(batch, seqlen)`.
        expected: `logits` of the last position and `hidden_states` of all.
    """
    llama = load_pretrained(weights, causal=causal, init_weights=False).eval()
    if llama.vocab_size <= tokens.max():
        raise InputError(f"{weights}: another model, its vocabulary is only {llama.vocab_size}")
    with torch.inference_mode():
        logits, hidden_states = llama(tokens)
    for name, ours in (("logits", logits), ("hidden_states", hidden_states)):
        theirs = expected[name]
        if theirs.shape != ours.shape or not torch.allclose(ours, theirs, atol=1e-5, rtol=1e-3):
            difference = "in shape"
            if theirs.shape == ours.shape:
                difference = f"by up to {(ours - theirs).abs().max():.3g}"
            sys.exit(f"Your Llama implementation is wrong: {name} differ {difference}")


def read_expected(path: str, names: set[str]) -> dict:
    expected = read_checkpoint(path)
    if not names <= expected.keys():
        raise InputError(f"{path}: no {' and '.join(sorted(names))} in it; fetch it again")
    return expected


def main() -> None:
    seed_everything(1337)
    if Path("stories42M.pt").exists():
        expected = read_expected("sanity_check.data", {"logits", "hidden_states"})
        compare("stories42M.pt", False, TOKENS, expected)
        checked = "stories42M.pt"
    else:
        checked = demo_path("model.pt")
        expected = read_expected(demo_path("sanity_check.data"), {"tokens", "unmasked", "causal"})
        for name in ("unmasked", "causal"):
            compare(checked, name == "causal", expected["tokens"], expected[name])
    print("Your Llama implementation is correct!")
    print(f"checked with {checked}", file=sys.stderr)


def run() -> None:
    ArgumentParser(description="Check the model against independent values.").parse_args()
    main()


if __name__ == "__main__":
    run_script(run)
