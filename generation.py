"""`--option generate`: continue a text, shown as it comes."""

import argparse
import sys
import time
import warnings
from pathlib import Path

from tqdm import tqdm

from decoding import decode, decode_unmasked
from llama import load_pretrained
from packing import pack
from tokenizer import Tokenizer, check_vocabulary
from utils import atomic_write, peak_memory, pick_device, with_defaults


def generate_sentence(
    args: argparse.Namespace,
    prefix: str,
    outfile: str | Path,
    max_new_tokens: int = 75,
    temperature: float = 0.0,
) -> None:
    """Load the model, continue `prefix`, print the text and write it to a file.

    On a terminal the text appears piece by piece. At the end one line on standard error tells
    speed and memory. Ctrl-C ends the text early; what there is of it is written.

    Args:
        args: the command line's; of it are used `use_gpu`, `pretrained_model_path`,
            `max_sentence_len` and, where they are there, `causal`, `dtype` and `tokenizer_path`.
        temperature: 0 takes the likeliest token each time.
    """
    args = with_defaults(args)
    device = pick_device(args.use_gpu)
    llama = load_pretrained(args.pretrained_model_path, causal=args.causal)
    tokenizer = Tokenizer(args.max_sentence_len, args.tokenizer_path)
    check_vocabulary(tokenizer, llama.vocab_size, args.pretrained_model_path)
    llama = llama.to(device).eval()
    if llama.config.causal or args.dtype != "float32":  # else the assignment's, to the digit
        pack(llama, args.dtype)
    print(f"load model from {args.pretrained_model_path}")
    print(f"Temperature is {temperature}")

    ids = tokenizer.encode(prefix, bos=True, eos=False)
    n_prompt = len(ids)
    steps = decode if llama.config.causal else decode_unmasked
    text = TextStream(tokenizer)
    interrupted = False
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:  # to show them behind the text
        try:
            for (token,) in tqdm(
                steps(llama, [ids], max_new_tokens, temperature),
                total=max_new_tokens,
                desc="generate",
                leave=False,
                disable=True if text.is_live else None,
            ):
                ids.append(token)
                text.show(ids)
        except KeyboardInterrupt:
            interrupted = True
    seconds = time.perf_counter() - start

    sentence = tokenizer.decode(ids)
    text.finish(sentence)
    for warning in caught:
        warnings.warn(warning.message, stacklevel=2)
    print("---------------")
    with atomic_write(outfile) as file:
        file.write(sentence)
    print(f"Wrote generated sentence to {outfile}.", flush=True)
    n_new = len(ids) - n_prompt
    print(
        f"{n_new} tokens, {seconds:.2f} s, {n_new / seconds:.1f} tokens/s, "
        f"peak memory {peak_memory(device) / 2**30:.2f} GiB",
        file=sys.stderr,
    )
    if interrupted:
        raise KeyboardInterrupt


class TextStream:
    """Shows growing text on a terminal, whole characters only; elsewhere only at the end.

    Attributes:
        is_live: whether standard output is a terminal.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.is_live = sys.stdout.isatty()
        self.n_shown = 0

    def show(self, ids: list[int]) -> None:
        """Show what the ids add to the text, unless it ends within a character's bytes."""
        if self.is_live:
            # An incomplete character decodes to replacement characters until its last byte comes.
            self._show(self.tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}"))

    def finish(self, text: str) -> None:
        """Show the rest of the text and end the line."""
        self._show(text)
        print()

    def _show(self, text: str) -> None:
        print(text[self.n_shown :], end="", flush=True)
        self.n_shown = max(self.n_shown, len(text))
