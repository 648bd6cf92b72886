"""`--option generate`: continue a text and show it while it grows."""

import io
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from config import LlamaConfig
from llama import Llama
from minllama.checkpoints.formats import find_tokenizer
from minllama.common.errors import InputError, explain_out_of_memory, in_gibibytes, print_error
from minllama.common.files import atomic_write, check_outputs
from minllama.common.flags import DEMO_MODEL, TaskSettings
from minllama.common.progress import progress_bar
from minllama.common.settings import flag
from minllama.inference.generator import GenerationBatch, TextGenerator
from minllama.inference.sampling import Sampling
from minllama.training import distributed
from tokenizer import TOKENIZER_MODEL
from utils import peak_memory

PREFIX = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)
LINE = "---------------"  # below a text
LESS_MEMORY = "lower --max_new_tokens, or add --causal with --dtype int8 or bfloat16"


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(TaskSettings):
    """The flags of text generation."""

    title = "generate"

    compile: bool = flag(False, "compile the decoding step of a causal model (Numba)")
    prefix: str = flag(PREFIX, "the text to continue", metavar="TEXT")
    max_new_tokens: int = flag(75, "number of tokens to generate")
    temperature: float | None = flag(
        None, "generate at this temperature only, not at 0 and 1; 0 is greedy"
    )
    top_k: int | None = flag(None, "sample only from this many of the most likely tokens", low=1)
    top_p: float | None = flag(
        None, "sample only from the most likely tokens with this total probability", high=1
    )
    repetition_penalty: float = flag(
        1.0, "divide the scores of tokens of the text; above 1 repeats less", low=1e-3
    )
    stop: list[str] | None = flag(
        None, "end a text before the first of these that it adds", nargs="+", metavar="TEXT"
    )
    num_samples: int | None = flag(None, "number of texts, generated as one batch", low=1)
    interactive: bool = flag(False, "continue each line of standard input; writes no file")

    def resolved(self) -> Self:
        settings = self.with_demo(DEMO_MODEL)
        path = settings.tokenizer_path or find_tokenizer(settings.pretrained_model_path)
        return settings.replace(tokenizer_path=path)

    def validate(self) -> None:
        """Check that the flags go together.

        Raises:
            InputError: they do not.
        """
        if self.stop is not None and "" in self.stop:
            raise InputError("--stop: an empty text is everywhere; leave it out")
        if self.interactive and "prefix" in self.explicit:
            raise InputError("--interactive: takes its texts from the input; leave --prefix out")

    @property
    def inputs(self) -> list[str]:
        """The files that are read."""
        return [self.pretrained_model_path, self.tokenizer_path or TOKENIZER_MODEL]

    @property
    def outputs(self) -> dict[float, str]:
        """The file of each temperature: the assignment's two, or the only one that is wanted."""
        high = self.generated_sentence_high_temp_out
        if self.temperature is None and self.num_samples is None:
            return {0.0: self.generated_sentence_low_temp_out, 1.0: high}
        return {self.one_temperature: high}

    @property
    def one_temperature(self) -> float:
        """The temperature where only one is wanted."""
        return 1.0 if self.temperature is None else self.temperature


def generate(settings: GenerateSettings) -> None:
    """Write the assignment's two texts, or those that the flags ask for, or start the chat loop."""
    distributed.require_one_process("generate")
    settings.validate()
    if not settings.interactive:
        check_outputs(settings.outputs.values(), settings.inputs)
    with explain_out_of_memory("generating", LESS_MEMORY):
        generator = load_generator(settings)
        if settings.interactive:
            chat(generator, settings)
            return
        for temperature, outfile in settings.outputs.items():
            write_texts(generator, settings, outfile, temperature)


def generate_sentence(
    args: Any,
    prefix: str,
    outfile: str | Path,
    max_new_tokens: int = 75,
    temperature: float = 0.0,
) -> None:
    """Load the model, continue `prefix`, print the text and write it to a file.

    Args:
        args: any object with some flags of `GenerateSettings` as attributes.
        temperature: 0 takes the most likely token each time.
    """
    settings = GenerateSettings.from_args(args)
    settings = settings.replace(prefix=prefix, max_new_tokens=max_new_tokens)
    check_outputs([outfile], settings.inputs)
    write_texts(load_generator(settings), settings, outfile, temperature)


def load_generator(settings: GenerateSettings) -> TextGenerator:
    """Load the model and the tokenizer that the flags name."""
    compile = settings.compile
    if compile and not settings.use_gpu and (settings.num_samples or 1) > 1:
        warnings.warn("--compile: not available with several samples", stacklevel=2)
        compile = False
    generator = TextGenerator(
        settings.pretrained_model_path,
        settings.tokenizer_path,
        causal=settings.causal,
        dtype=settings.dtype,
        use_gpu=settings.use_gpu,
        compile=compile,
        limit_threads=True,
    )
    generator.tokenizer.max_len = settings.max_sentence_len
    return generator


def make_batch(
    generator: TextGenerator, settings: GenerateSettings, prompt: str, temperature: float
) -> GenerationBatch:
    """Make a batch of texts that will continue a prompt.

    Raises:
        InputError: the prompt is not valid text, or longer than the context.
    """
    sampling = Sampling(temperature, settings.top_k, settings.top_p, settings.repetition_penalty)
    prompts = [prompt] * (settings.num_samples or 1)
    return GenerationBatch(
        generator, prompts, sampling, settings.max_new_tokens, settings.stop or ()
    )


def write_texts(
    generator: TextGenerator, settings: GenerateSettings, outfile: str | Path, temperature: float
) -> None:
    """Continue the prefix, print the texts and write them to a file.

    A single text on a terminal is streamed. A last line on standard error reports speed and memory.
    Ctrl-C ends the texts early and writes what they have.
    """
    print(f"load model from {settings.pretrained_model_path}")
    print(f"Temperature is {temperature}")
    is_unmasked = not generator.llama.config.causal
    if is_unmasked and temperature > 0:
        draw_initial_weights(generator.llama.config)
    batch = make_batch(generator, settings, settings.prefix, temperature)
    n_texts = len(batch.rows)
    start = time.perf_counter()
    was_interrupted = generate_and_print(
        batch, is_live=sys.stdout.isatty() and n_texts == 1, desc="generate"
    )
    seconds = time.perf_counter() - start
    with atomic_write(outfile) as file:
        file.write(f"\n{LINE}\n".join(batch.text(row) for row in range(n_texts)))
    noun = "sentence" if n_texts == 1 else "sentences"
    print(f"Wrote generated {noun} to {outfile}.", flush=True)
    print(
        f"{batch.n_new} tokens, {seconds:.2f} s, {batch.n_new / seconds:.1f} tokens/s, "
        f"peak memory {in_gibibytes(peak_memory(generator.device))}",
        file=sys.stderr,
    )
    if was_interrupted:
        raise KeyboardInterrupt
    if is_unmasked and temperature == 0:
        draw_initial_weights(generator.llama.config)


def draw_initial_weights(config: LlamaConfig) -> None:
    """Draw the random numbers that the assignment draws when it loads the model for each text.

    Without a mask later draws are then the assignment's. The text at temperature 0 does not depend
    on them, so they are drawn after it is shown.
    """
    with torch.device("cpu"):
        Llama(config)


def generate_and_print(batch: GenerationBatch, *, is_live: bool, desc: str | None = None) -> bool:
    """Generate texts and print them, each with a line below. Warnings come after them.

    Args:
        is_live: stream the only text.
        desc: name of the progress bar otherwise; None shows none.

    Returns:
        whether Ctrl-C ended them early.
    """
    n_shown, was_interrupted = 0, False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = progress_bar(
            batch, total=batch.max_new_tokens, desc=desc, disable=is_live or desc is None
        )
        try:
            for _ in steps:
                if is_live:
                    text = batch.stable_prefix(0)
                    print(text[n_shown:], end="", flush=True)
                    n_shown = len(text)
        except KeyboardInterrupt:
            was_interrupted = True
    print(batch.text(0)[n_shown:])
    for row in range(1, len(batch.rows)):
        print(LINE)
        print(batch.text(row))
    for warning in caught:
        warnings.warn(warning.message, stacklevel=2)
    print(LINE, flush=True)
    return was_interrupted


def chat(generator: TextGenerator, settings: GenerateSettings) -> None:
    """Continue each line of standard input.

    On a terminal Ctrl-C ends a text, Ctrl-D the loop; Ctrl-C at the prompt ends the program.
    """
    is_terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Lines may end in \r, and only the prompt with bad bytes is refused.
        sys.stdin.reconfigure(errors="surrogateescape", newline=None)
    if is_terminal:
        print("Ctrl-C ends a text, Ctrl-D leaves", file=sys.stderr)
    while True:
        try:
            if is_terminal:  # standard output may be a file
                print("> ", end="", file=sys.stderr, flush=True)
            prompt = input()
        except EOFError:
            break
        try:
            batch = make_batch(generator, settings, prompt, settings.one_temperature)
        except InputError as error:  # the next prompt may be shorter
            print_error(str(error))
            continue
        if generate_and_print(batch, is_live=len(batch.rows) == 1) and not is_terminal:
            raise KeyboardInterrupt
    if is_terminal:
        print(file=sys.stderr)
