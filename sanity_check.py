"""Check the model, with the weights of `stories42M.pt`, against the reference's; run as a script.

Two rows of ids go through the model without a mask; logits and hidden states are compared.
"""

import sys

import torch

from base_llama import read_checkpoint
from llama import load_pretrained
from utils import InputError, run_script, seed_everything

TOKENS = [
    [101, 7592, 2088, 102, 0, 0, 0, 0],
    [101, 7592, 15756, 2897, 2005, 17953, 2361, 102],
]


def main() -> None:
    seed_everything(1337)
    expected = read_checkpoint("sanity_check.data")
    if not {"logits", "hidden_states"} <= expected.keys():
        raise InputError("sanity_check.data: no logits and hidden_states in it; fetch it again")
    llama = load_pretrained("stories42M.pt", causal=False).eval()
    if llama.vocab_size != 32000:
        raise InputError("stories42M.pt: another model, its vocabulary is not the 32000 of Llama 2")
    with torch.inference_mode():
        logits, hidden_states = llama(torch.tensor(TOKENS))
    for name, ours in (("logits", logits), ("hidden_states", hidden_states)):
        theirs = expected[name]
        if not torch.allclose(ours, theirs, atol=1e-5, rtol=1e-3):
            difference = (ours - theirs).abs().max()
            sys.exit(f"Your Llama implementation is wrong: {name} differ by up to {difference:.3g}")
    print("Your Llama implementation is correct!")


if __name__ == "__main__":
    run_script(main)
