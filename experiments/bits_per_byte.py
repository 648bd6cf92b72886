"""Bits per byte of texts: without the mask that a model is trained with, with it, in low precision.

    .venv/bin/python -m experiments.bits_per_byte --pretrained-model-path stories260K.pt \\
        --tokenizer-path tok512.model --text tinystories/dev.txt

That is the negative log-likelihood of each text's first 800 characters given BOS, summed over all
texts, in bits, over the number of UTF-8 bytes. Lower is better; it does not depend on the
tokenizer. Several files get a line each, causal in float32.
"""

import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from experiments.corpus import read_documents
from llama import Llama, load_pretrained
from minllama.common.errors import InputError
from minllama.common.program import run_script, script_parser
from minllama.kernels.cpu import accelerate
from minllama.kernels.quantize import DTYPES, prepare_for_decoding
from minllama.text.corpus import warn_if_lossy
from tokenizer import Tokenizer, check_vocabulary


def read_stories(path: str | Path) -> list[str]:
    """The stories between `<|endoftext|>` lines, each cut to its first 800 characters."""
    return [story[:800] for story in read_documents(Path(path))]


@torch.inference_mode()
def bits_per_byte(llama: Llama, tokenizer: Tokenizer, stories: list[str]) -> float:
    """Negative log-likelihood of the stories in bits, per byte.

    Raises:
        InputError: it is not finite, or a story is longer than the context.
    """
    nats = 0.0
    for story in stories:
        ids = torch.tensor([tokenizer.encode(story, bos=True, eos=False)])
        if ids.shape[1] - 1 > llama.config.max_seq_len:
            raise InputError(
                f"a story of {ids.shape[1]} tokens does not fit the context of "
                f"{llama.config.max_seq_len}; take another model"
            )
        logits, _ = llama(ids[:, :-1], targets=ids[:, 1:])
        nats += F.cross_entropy(logits[0].float(), ids[0, 1:], reduction="sum").item()
    if not math.isfinite(nats):
        raise InputError(f"the log-likelihood is {nats}; the weights are damaged, take others")
    return nats / math.log(2) / sum(len(story.encode()) for story in stories)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--pretrained-model-path", required=True)
    parser.add_argument("--tokenizer-path", required=True)
    parser.add_argument("--text", required=True, nargs="+")
    args = parser.parse_args()
    texts = {path: read_stories(path) for path in args.text}
    tokenizer = Tokenizer(tokenizer_model=args.tokenizer_path)
    warn_if_lossy(tokenizer, itertools.chain(*texts.values()))

    def load(causal: bool) -> Llama:
        llama = load_pretrained(args.pretrained_model_path, causal=causal, init_weights=False)
        check_vocabulary(tokenizer, llama.config, args.pretrained_model_path)
        accelerate(llama)
        return llama.eval()

    if len(texts) > 1:
        llama = prepare_for_decoding(load(causal=True), "float32")
        for path, stories in texts.items():
            print(f"{bits_per_byte(llama, tokenizer, stories):.4f} {path}", flush=True)
        return
    (stories,) = texts.values()
    llama = load(causal=False)
    print(f"unmasked: {bits_per_byte(llama, tokenizer, stories):.4f} bits per byte")
    for dtype in DTYPES:
        llama = prepare_for_decoding(load(causal=True), dtype)
        print(f"causal, {dtype}: {bits_per_byte(llama, tokenizer, stories):.4f} bits per byte")


if __name__ == "__main__":
    run_script(main)
