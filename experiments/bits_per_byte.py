"""Bits per byte of texts: without the mask that a model is trained with, with it, in low precision.

    .venv/bin/python -m experiments.bits_per_byte --pretrained-model-path stories260K.pt \\
        --tokenizer-path tok512.model --text tinystories/dev.txt

That is the negative log-likelihood of each text's first 800 characters given BOS, summed over all
texts, in bits, over the number of UTF-8 bytes. Lower is better; it does not depend on the
tokenizer. Several files get a line each, causal in float32.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F

from llama import Llama, load_pretrained
from minllama.common.program import run_script, script_parser
from minllama.kernels.cpu import accelerate
from minllama.kernels.quantize import DTYPES, prepare_for_decoding
from tokenizer import Tokenizer


def read_stories(path: str | Path) -> list[str]:
    """The stories between `<|endoftext|>` lines, each cut to its first 800 characters."""
    text = Path(path).read_text(encoding="utf-8")
    return [story.strip()[:800] for story in text.split("<|endoftext|>") if story.strip()]


@torch.inference_mode()
def bits_per_byte(llama: Llama, tokenizer: Tokenizer, stories: list[str]) -> float:
    """Negative log-likelihood of the stories in bits, per byte."""
    nats = 0.0
    for story in stories:
        ids = torch.tensor([tokenizer.encode(story, bos=True, eos=False)])
        logits, _ = llama(ids[:, :-1], targets=ids[:, 1:])
        nats += F.cross_entropy(logits[0].float(), ids[0, 1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(story.encode()) for story in stories)


def load(path: str, causal: bool) -> Llama:
    """A model for inference with fast kernels."""
    llama = load_pretrained(path, causal=causal, init_weights=False).eval()
    accelerate(llama)
    return llama


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--pretrained-model-path", required=True)
    parser.add_argument("--tokenizer-path", required=True)
    parser.add_argument("--text", required=True, nargs="+")
    args = parser.parse_args()
    tokenizer = Tokenizer(tokenizer_model=args.tokenizer_path)
    if len(args.text) > 1:
        llama = prepare_for_decoding(load(args.pretrained_model_path, causal=True), "float32")
        for path in args.text:
            print(f"{bits_per_byte(llama, tokenizer, read_stories(path)):.4f} {path}", flush=True)
        return
    stories = read_stories(args.text[0])
    unmasked = load(args.pretrained_model_path, causal=False)
    print(f"unmasked: {bits_per_byte(unmasked, tokenizer, stories):.4f} bits per byte")
    for dtype in DTYPES:
        llama = prepare_for_decoding(load(args.pretrained_model_path, causal=True), dtype)
        print(f"causal, {dtype}: {bits_per_byte(llama, tokenizer, stories):.4f} bits per byte")


if __name__ == "__main__":
    run_script(main)
