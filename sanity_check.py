"""Check the model against independent values; a script.

If `stories42M.pt` is here, they are the reference's: two rows of ids, no mask. Otherwise they are
those of the demo model, computed by `tests/make_fixtures.py`, without a mask and with one.
"""

if __name__ == "__main__":  # the imports below take seconds
    from minllama.common.program import end_at_interrupt

    end_at_interrupt()

import sys
from pathlib import Path
from typing import Any

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


def compare(weights: str, causal: bool, tokens: torch.Tensor, expected: dict[str, Any]) -> None:
    """Exit with a message and code 1 if the model's outputs are wrong.

    Args:
        tokens: ids `(batch, seqlen)`.
        expected: `logits` of the last position, and `hidden_states` of all.
    """
    llama = load_pretrained(weights, causal=causal, init_weights=False).eval()
    if llama.vocab_size <= tokens.max():
        raise InputError(f"{weights}: another model, its vocabulary is only {llama.vocab_size}")
    with torch.inference_mode():
        logits, hidden_states = llama(tokens)
    for name, ours in (("logits", logits), ("hidden_states", hidden_states)):
        theirs = expected[name]
        if theirs.shape != ours.shape:
            sys.exit(f"Your Llama implementation is wrong: {name} differ in shape")
        if not torch.allclose(ours, theirs, atol=1e-5, rtol=1e-3):
            difference = f"{(ours - theirs).abs().max():.3g}"
            sys.exit(f"Your Llama implementation is wrong: {name} differ by up to {difference}")


def main() -> None:
    seed_everything(1337)
    if Path("stories42M.pt").exists():
        checked = "stories42M.pt"
        compare(checked, False, TOKENS, read_checkpoint("sanity_check.data"))
    else:
        checked = demo_path("model.pt")
        expected = read_checkpoint(demo_path("sanity_check.data"))
        compare(checked, False, expected["tokens"], expected["unmasked"])
        compare(checked, True, expected["tokens"], expected["causal"])
    print("Your Llama implementation is correct!")
    print(f"checked with {checked}", file=sys.stderr)


def run() -> None:
    ArgumentParser(description="Check the model against independent values.").parse_args()
    main()


if __name__ == "__main__":
    run_script(run)
