"""`--option generate`: continue a text, shown as it comes."""

import argparse
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from common.errors import in_gibibytes
from common.files import atomic_write, check_outputs
from common.settings import flag
from inference.decoding import decode, decode_unmasked
from inference.packing import pack
from llama import Llama, load_pretrained
from tasks.settings import DEMO_MODEL, TaskSettings
from tokenizer import Tokenizer, check_vocabulary
from training.cpu import accelerate
from utils import peak_memory, pick_device

PREFIX = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(TaskSettings):
    """Two texts, at temperature 0 and 1."""

    title = "generate"
    description = None
    demo = (DEMO_MODEL,)
    less_memory = "lower --max_new_tokens, or add --causal with --dtype int8 or bfloat16"
    keeps_freed_memory = False

    prefix: str = flag(PREFIX, "the text to continue", metavar="TEXT")
    max_new_tokens: int = flag(75, "number of tokens to generate")


class Writer:
    """A model and its tokenizer, loaded for generation.

    Raises:
        InputError: the tokenizer is not the model's.
    """

    def __init__(self, settings: TaskSettings):
        self.settings = settings
        self.device = pick_device(settings.use_gpu)
        path = settings.pretrained_model_path
        # What is packed is converted weight by weight; until then it stays in the file.
        llama = load_pretrained(path, causal=settings.causal, init_weights=False, dtype=None)
        self.tokenizer = Tokenizer(settings.max_sentence_len, settings.tokenizer_path)
        check_vocabulary(self.tokenizer, llama.vocab_size, path)
        self.llama = llama.to(self.device).eval()
        accelerate(llama)
        if llama.config.causal or settings.dtype != "float32":
            pack(llama, settings.dtype)
        else:  # it stays the assignment's, to the digit
            llama.float()

    def write(
        self, prefix: str, outfile: str | Path, max_new_tokens: int, temperature: float
    ) -> None:
        """Continue `prefix`, print the text and write it to a file, as `generate_sentence` does."""
        print(f"load model from {self.settings.pretrained_model_path}")
        print(f"Temperature is {temperature}")
        is_assignments = not self.llama.config.causal
        if is_assignments and temperature > 0:
            draw_initial_weights(self.llama)
        ids = self.tokenizer.encode(prefix, bos=True, eos=False)
        n_prompt = len(ids)
        steps = decode if self.llama.config.causal else decode_unmasked
        text = TextStream(self.tokenizer)
        interrupted = False
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:  # to show them behind the text
            try:
                for (token,) in tqdm(
                    steps(self.llama, [ids], max_new_tokens, temperature),
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

        sentence = self.tokenizer.decode(ids)
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
            f"peak memory {in_gibibytes(peak_memory(self.device))}",
            file=sys.stderr,
        )
        if interrupted:
            raise KeyboardInterrupt
        if is_assignments and temperature == 0:
            draw_initial_weights(self.llama)


def draw_initial_weights(llama: Llama) -> None:
    """Draw what the assignment draws when it loads the model, as it does for every text.

    It has no mask, and without one the random numbers that follow are then the assignment's. At
    temperature 0 the text does not depend on them, so they are drawn when it stands there.
    """
    with torch.device("cpu"):
        Llama(llama.config)


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
    settings = GenerateSettings.from_args(args)
    Writer(settings).write(prefix, outfile, max_new_tokens, temperature)


def generate(args: argparse.Namespace) -> None:
    """Write the assignment's two texts, at temperature 0 and at temperature 1."""
    settings = GenerateSettings.from_args(args)
    outputs = {
        0.0: settings.generated_sentence_low_temp_out,
        1.0: settings.generated_sentence_high_temp_out,
    }
    inputs = [settings.pretrained_model_path]
    if settings.tokenizer_path is not None:
        inputs.append(settings.tokenizer_path)
    check_outputs(outputs.values(), inputs)
    writer = Writer(settings)
    for temperature, outfile in outputs.items():
        writer.write(settings.prefix, outfile, settings.max_new_tokens, temperature)


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
