"""`--option generate`: continue a text, shown as it comes."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from checkpoints.formats import tokenizer_beside
from common.errors import InputError, complain, in_gibibytes
from common.files import atomic_write, check_outputs
from common.progress import Bar
from common.settings import flag
from inference.decoding import decode, decode_unmasked
from inference.one_row import OneRowLlama
from inference.packing import BYTES, pack
from inference.sampling import Sampling
from llama import Llama, load_pretrained
from tasks.settings import DEMO_MODEL, TaskSettings
from tokenizer import TOKENIZER_MODEL, Tokenizer, check_vocabulary
from training.cpu import accelerate
from utils import peak_memory, pick_device

PREFIX = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)
LINE = "---------------"  # below a text
FOR_ONE_THREAD = 8 << 20  # bytes of weights; for fewer a second thread gains little


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(TaskSettings):
    """Two texts, at temperature 0 and 1, or what the flags say."""

    title = "generate"
    description = None
    demo = (DEMO_MODEL,)
    less_memory = "lower --max_new_tokens, or add --causal with --dtype int8 or bfloat16"
    keeps_freed_memory = False

    prefix: str = flag(PREFIX, "the text to continue", metavar="TEXT")
    max_new_tokens: int = flag(75, "number of tokens to generate")
    temperature: float | None = flag(
        None, "one temperature in place of the two, 0 and 1; 0 takes the likeliest token each time"
    )
    top_k: int | None = flag(None, "draw from so many of the likeliest tokens only", low=1)
    top_p: float | None = flag(
        None, "draw from the likeliest tokens only that together have this probability", high=1
    )
    repetition_penalty: float = flag(
        1.0, "divides the scores of tokens that the text has; over 1 it repeats less"
    )
    stop: list[str] | None = flag(
        None, "end a text before the first of these that it adds", nargs="+", metavar="TEXT"
    )
    num_samples: int | None = flag(None, "texts, written together, at one temperature", low=1)
    interactive: bool = flag(False, "continue each line that is typed in; nothing goes to a file")
    compile: bool = flag(False, "make decoding one compiled function; the first time takes seconds")

    def check(self) -> None:
        """
        Raises:
            InputError: flags are out of range, or do not go together.
        """
        if self.repetition_penalty == 0:
            raise InputError("--repetition_penalty 0: must be greater than 0")
        if self.stop is not None and "" in self.stop:
            raise InputError("--stop: an empty text is everywhere; leave it out")
        if self.interactive and "prefix" in self.given:
            raise InputError("--interactive: takes its texts from the input; leave --prefix out")

    @property
    def is_one(self) -> bool:
        """Whether there is one temperature, not the assignment's two."""
        return self.temperature is not None or self.num_samples is not None

    def sampling(self, temperature: float) -> Sampling:
        return Sampling(temperature, self.top_k, self.top_p, self.repetition_penalty)


class TextGenerator:
    """A model and its tokenizer, for texts in and texts out.

        generator = TextGenerator("data/demo/model.pt", dtype="int8")
        generator.complete(["Once upon a time", "The old man"], Sampling(0.8, top_p=0.9))

    Args:
        checkpoint: in any format that `load_pretrained` takes.
        tokenizer_path: by default the tokenizer that lies beside the checkpoint, or else the one
            in the working folder.
        causal: overrides what the checkpoint says.
        dtype: of the weights: float32, bfloat16 or int8.
        use_gpu: run on CUDA, or else MPS.
        compile: see `inference/compiled.py`; causal models only.

    Decoding of a small causal model on a CPU sets PyTorch's threads to one, see `limit_threads`.

    Raises:
        FileNotFoundError, InputError: it cannot be loaded, or the tokenizer is not the model's.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        tokenizer_path: str | Path | None = None,
        *,
        causal: bool | None = None,
        dtype: str = "float32",
        use_gpu: bool = False,
        compile: bool = False,
    ):
        self.device = pick_device(use_gpu)
        # What is packed is converted weight by weight; until then it stays in the file.
        llama = load_pretrained(checkpoint, causal=causal, init_weights=False, dtype=None)
        path = tokenizer_path or tokenizer_beside(checkpoint) or TOKENIZER_MODEL
        self.tokenizer = Tokenizer(tokenizer_model=path)
        check_vocabulary(self.tokenizer, llama.vocab_size, checkpoint)
        self.llama = llama.to(self.device).eval()
        if llama.config.causal and self.device.type == "cpu":
            limit_threads(llama, dtype)
        accelerate(llama)
        if compile and llama.config.causal:
            self.llama = compiled(llama, dtype, self.device)
        elif llama.config.causal and self.device.type == "cpu":
            self.llama = OneRowLlama(llama, dtype)
        elif llama.config.causal or dtype != "float32":
            pack(llama, dtype)
        else:  # it stays the assignment's, to the digit
            llama.float()
        if compile and not llama.config.causal:
            warnings.warn("--compile: nothing is compiled without --causal", stacklevel=2)

    def complete(
        self,
        prompts: Sequence[str],
        sampling: Sampling | None = None,
        max_new_tokens: int = 75,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Continue prompts of any lengths, together where the model is causal.

        Args:
            sampling: by default at temperature 1.
            stop: a text ends before the first of these that it adds.

        Returns:
            the prompts with their continuations.
        """
        texts = Texts(self, prompts, sampling or Sampling(), max_new_tokens, stop)
        for _ in texts:
            pass
        return [texts.text(row) for row in range(len(prompts))]


def limit_threads(llama: Llama, dtype: str) -> None:
    """Let PyTorch use one thread where more do not pay, unless `OMP_NUM_THREADS` says how many.

    Threads wait for each other after every product. Beside another busy process each wait may be
    for a turn on a processor, and a small model decodes several times slower with two threads than
    with one (`benchmarks/threads.py`).
    """
    weights = {id(p): p.numel() for p in llama.parameters()}  # a shared one counts once
    if (
        sum(weights.values()) * BYTES[dtype] < FOR_ONE_THREAD
        and "OMP_NUM_THREADS" not in os.environ
    ):
        torch.set_num_threads(1)


def compiled(llama: Llama, dtype: str, device: torch.device) -> nn.Module:
    """The model, packed, with its step compiled for the device it is on.

    Raises:
        InputError: there is no way to compile for it, or Numba is not installed.
    """
    if device.type == "cuda":
        from inference.graphs import GraphLlama

        return GraphLlama(llama, dtype)
    if device.type != "cpu":
        raise InputError(f"--compile: not on {device.type}; leave it out")
    try:
        from inference.compiled import CompiledLlama
    except ImportError as error:
        raise InputError(
            "--compile: needs Numba; install it with `python -m pip install -r "
            "requirements-extra.txt`, or leave it out"
        ) from error
    return CompiledLlama(llama, dtype)


class Texts:
    """Texts that grow as one iterates; each step is a token of every row that has not ended.

    Attributes:
        n_new: how many tokens came so far, in all rows.
    """

    def __init__(
        self,
        generator: TextGenerator,
        prompts: Sequence[str],
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ):
        self.llama, self.tokenizer = generator.llama, generator.tokenizer
        self.sampling, self.max_new_tokens, self.stop = sampling, max_new_tokens, stop
        self.rows = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        self.starts = [len(self.tokenizer.decode(row)) for row in self.rows]
        self.n_new = 0
        self._ended: set[int] = set()

    def __iter__(self) -> Iterator[None]:
        """One step after the other."""
        arguments = (self.max_new_tokens, self.sampling)
        if self.llama.config.causal:
            yield from self._add(
                decode(self.llama, self.rows, *arguments, ended=self._ended), range(len(self.rows))
            )
        elif len(set(map(len, self.rows))) == 1:
            yield from self._add(
                decode_unmasked(self.llama, self.rows, *arguments, self._ended),
                range(len(self.rows)),
            )
        else:  # without a mask, padding would be read too
            for i, row in enumerate(self.rows):
                yield from self._add(decode_unmasked(self.llama, [row], *arguments), [i])

    def text(self, row: int) -> str:
        """What there is of a text, up to where it stops."""
        text = self.tokenizer.decode(self.rows[row])
        return text[: min(self._stops(text, row), default=len(text))]

    def _stops(self, text: str, row: int) -> list[int]:
        """Where the continuation of a row has what stops it."""
        places = (text.find(stop, self.starts[row]) for stop in self.stop)
        return [place for place in places if place >= 0]

    def settled(self, row: int) -> str:
        """What there is of a text and will stay: without what may become a stop or a character."""
        # An incomplete character decodes to replacement characters until its last byte comes.
        text = self.text(row).rstrip("\N{REPLACEMENT CHARACTER}")
        if row in self._ended:
            return text
        n_open = (
            n
            for stop in self.stop
            for n in range(1, len(stop))
            if text.endswith(stop[:n]) and len(text) - n >= self.starts[row]
        )
        return text[: len(text) - max(n_open, default=0)]

    def _add(self, steps: Iterator[list[int | None]], rows: Sequence[int]) -> Iterator[None]:
        for new in steps:
            for row, token in zip(rows, new, strict=True):
                if token is not None and row not in self._ended:
                    self.rows[row].append(token)
                    self.n_new += 1
                    if self.stop and self._stops(self.tokenizer.decode(self.rows[row]), row):
                        self._ended.add(row)
            yield
            if self._ended.issuperset(rows):
                return


def generator_of(settings: TaskSettings) -> TextGenerator:
    """The model and the tokenizer that the flags name."""
    generator = TextGenerator(
        settings.pretrained_model_path,
        settings.tokenizer_path,
        causal=settings.causal,
        dtype=settings.dtype,
        use_gpu=settings.use_gpu,
        compile=getattr(settings, "compile", False),
    )
    generator.tokenizer.max_len = settings.max_sentence_len
    return generator


def write(
    generator: TextGenerator, settings: GenerateSettings, outfile: str | Path, temperature: float
) -> None:
    """Continue the prefix, print the texts and write them to a file.

    On a terminal a single text appears piece by piece, whole characters only. At the end one line
    on standard error tells speed and memory. Ctrl-C ends the texts early; what there is of them is
    written.
    """
    print(f"load model from {settings.pretrained_model_path}")
    print(f"Temperature is {temperature}")
    is_assignments = not generator.llama.config.causal
    if is_assignments and temperature > 0:
        draw_initial_weights(generator.llama)
    n_samples = settings.num_samples or 1
    texts = Texts(
        generator,
        [settings.prefix] * n_samples,
        settings.sampling(temperature),
        settings.max_new_tokens,
        settings.stop or (),
    )
    stream = TextStream(is_live=sys.stdout.isatty() and n_samples == 1)
    interrupted = False
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:  # to show them behind the text
        try:
            for _ in Bar(
                texts, total=settings.max_new_tokens, desc="generate", disable=stream.is_live
            ):
                if stream.is_live:
                    stream.show(texts.settled(0))
        except KeyboardInterrupt:
            interrupted = True
    seconds = time.perf_counter() - start

    written = [texts.text(row) for row in range(n_samples)]
    stream.show(written[0])
    print()
    for text in written[1:]:
        print(LINE)
        print(text)
    for warning in caught:
        warnings.warn(warning.message, stacklevel=2)
    print(LINE)
    with atomic_write(outfile) as file:
        file.write(f"\n{LINE}\n".join(written))
    what = "sentence" if n_samples == 1 else "sentences"
    print(f"Wrote generated {what} to {outfile}.", flush=True)
    tell_speed(generator, texts.n_new, seconds)
    if interrupted:
        raise KeyboardInterrupt
    if is_assignments and temperature == 0:
        draw_initial_weights(generator.llama)


def tell_speed(generator: TextGenerator, n_new: int, seconds: float) -> None:
    print(
        f"{n_new} tokens, {seconds:.2f} s, {n_new / seconds:.1f} tokens/s, "
        f"peak memory {in_gibibytes(peak_memory(generator.device))}",
        file=sys.stderr,
    )


def draw_initial_weights(llama: Llama) -> None:
    """Draw what the assignment draws when it loads the model, as it does for every text.

    It has no mask, and without one the random numbers that follow are then the assignment's. At
    temperature 0 the text does not depend on them, so they are drawn when it stands there.
    """
    with torch.device("cpu"):
        Llama(llama.config)


def converse(generator: TextGenerator, settings: GenerateSettings) -> None:
    """Continue each line of the input. Ctrl-C ends a text, and behind none, as Ctrl-D, all."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("Ctrl-C ends a text, Ctrl-D leaves", file=sys.stderr)
    temperature = 1.0 if settings.temperature is None else settings.temperature
    while True:
        try:
            prompt = input("> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()
            return
        texts = Texts(
            generator,
            [prompt] * (settings.num_samples or 1),
            settings.sampling(temperature),
            settings.max_new_tokens,
            settings.stop or (),
        )
        stream = TextStream(is_live=len(texts.rows) == 1)
        try:
            for _ in texts:
                if stream.is_live:
                    stream.show(texts.settled(0))
        except KeyboardInterrupt:
            if not is_terminal:
                raise
        except InputError as error:  # a prompt that is too long, and the next one may not be
            complain(str(error))
            continue
        stream.show(texts.text(0))
        print()
        for row in range(1, len(texts.rows)):
            print(f"{LINE}\n{texts.text(row)}")
        print(LINE, flush=True)


def generate_sentence(
    args: argparse.Namespace,
    prefix: str,
    outfile: str | Path,
    max_new_tokens: int = 75,
    temperature: float = 0.0,
) -> None:
    """Load the model, continue `prefix`, print the text and write it to a file.

    Args:
        args: the command line's; of it are used `use_gpu`, `pretrained_model_path`,
            `max_sentence_len` and, where they are there, those of `GenerateSettings`.
        temperature: 0 takes the likeliest token each time.
    """
    settings = GenerateSettings.from_args(args)
    settings = settings.replace(prefix=prefix, max_new_tokens=max_new_tokens)
    write(generator_of(settings), settings, outfile, temperature)


def generate(args: argparse.Namespace) -> None:
    """Write the assignment's two texts, at temperature 0 and at temperature 1, or what is asked."""
    settings = GenerateSettings.from_args(args)
    settings.check()
    if settings.interactive:
        converse(generator_of(settings), settings)
        return
    outputs = {
        0.0: settings.generated_sentence_low_temp_out,
        1.0: settings.generated_sentence_high_temp_out,
    }
    if settings.is_one:
        temperature = 1.0 if settings.temperature is None else settings.temperature
        outputs = {temperature: settings.generated_sentence_high_temp_out}
    inputs = [settings.pretrained_model_path]
    if settings.tokenizer_path is not None:
        inputs.append(settings.tokenizer_path)
    check_outputs(outputs.values(), inputs)
    generator = generator_of(settings)
    for temperature, outfile in outputs.items():
        write(generator, settings, outfile, temperature)


class TextStream:
    """Prints of a growing text what is new.

    Args:
        is_live: whether it is shown as it grows.
    """

    def __init__(self, is_live: bool):
        self.is_live = is_live
        self.n_shown = 0

    def show(self, text: str) -> None:
        """Print what a text has more than the last."""
        print(text[self.n_shown :], end="", flush=True)
        self.n_shown = max(self.n_shown, len(text))
