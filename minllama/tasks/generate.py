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

from llama import Llama, load_pretrained
from minllama.checkpoints.formats import find_tokenizer, tokenizer_beside
from minllama.common.errors import InputError, explain_out_of_memory, in_gibibytes, print_error
from minllama.common.files import atomic_write, check_outputs
from minllama.common.flags import DEMO_MODEL, TaskSettings
from minllama.common.progress import Bar
from minllama.common.settings import flag
from minllama.inference.decoding import decode, decode_unmasked
from minllama.inference.sampling import Sampling
from minllama.kernels.batch1 import OneRowLlama
from minllama.kernels.cpu import accelerate
from minllama.kernels.quantize import BYTES, pack
from minllama.training import distributed
from tokenizer import TOKENIZER_MODEL, Tokenizer, check_vocabulary
from utils import peak_memory, pick_device

PREFIX = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)
LINE = "---------------"  # below a text
LESS_MEMORY = "lower --max_new_tokens, or add --causal with --dtype int8 or bfloat16"
FOR_ONE_THREAD = 8 << 20  # bytes of weights; for fewer a second thread gains little


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(TaskSettings):
    """Two texts, at temperature 0 and 1, or what the flags say."""

    title = "generate"
    description = None

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
        1.0, "divides the scores of tokens that the text has; over 1 it repeats less", low=1e-3
    )
    stop: list[str] | None = flag(
        None, "end a text before the first of these that it adds", nargs="+", metavar="TEXT"
    )
    num_samples: int | None = flag(None, "texts, written together, at one temperature", low=1)
    compile: bool = flag(False, "compile the decoding step of a causal model (Numba)")
    interactive: bool = flag(False, "continue each line that is typed in; nothing goes to a file")

    def resolved(self) -> "GenerateSettings":
        settings = self.with_demo(DEMO_MODEL)
        path = settings.tokenizer_path or find_tokenizer(settings.pretrained_model_path)
        return settings.replace(tokenizer_path=path)

    def check(self) -> None:
        """
        Raises:
            InputError: flags are out of range, or do not go together.
        """
        if self.stop is not None and "" in self.stop:
            raise InputError("--stop: an empty text is everywhere; leave it out")
        if self.interactive and "prefix" in self.explicit:
            raise InputError("--interactive: takes its texts from the input; leave --prefix out")

    @property
    def is_one(self) -> bool:
        """Whether there is one temperature, not the assignment's two."""
        return self.temperature is not None or self.num_samples is not None

    @property
    def one_temperature(self) -> float:
        """Where there is one, it is 1 unless a flag says another."""
        return 1.0 if self.temperature is None else self.temperature

    def sampling(self, temperature: float) -> Sampling:
        """How tokens are drawn at a temperature."""
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
        compile: make the step for one row on a CPU, or for any rows on CUDA, one compiled function;
            of a causal model only.
        may_limit_threads: set PyTorch's threads to one if the model is small, see `limit_threads`.

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
        may_limit_threads: bool = False,
    ):
        self.device = pick_device(use_gpu)
        # What is packed is converted weight by weight; until then it stays in the file.
        llama = load_pretrained(checkpoint, causal=causal, init_weights=False, dtype=None)
        path = tokenizer_path or tokenizer_beside(checkpoint) or TOKENIZER_MODEL
        self.tokenizer = Tokenizer(tokenizer_model=path)
        check_vocabulary(self.tokenizer, llama.vocab_size, checkpoint)
        self.llama = llama.to(self.device).eval()
        if may_limit_threads and llama.config.causal and self.device.type == "cpu":
            limit_threads(llama, dtype)
        accelerate(llama)
        if compile and not (llama.config.causal and self.device.type == "cpu"):
            where = f"on {self.device.type}" if llama.config.causal else "without --causal"
            warnings.warn(f"--compile: nothing is compiled {where}", stacklevel=2)
            compile = False
        if compile:
            self.llama = compiled(llama, dtype, self.device)
        elif llama.config.causal and self.device.type == "cpu":
            self.llama = OneRowLlama(llama, dtype)
        elif llama.config.causal or dtype != "float32":
            pack(llama, dtype)
        else:  # it stays the assignment's, to the digit
            llama.float()

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

        Raises:
            InputError: a prompt is longer than the context, or no text.
        """
        if not prompts:
            return []
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
    """The model, packed, with its step compiled for the device it is on, a CPU or CUDA.

    Raises:
        InputError: Numba is not installed, which a CPU needs.
    """
    if "numba" not in sys.modules:  # which reads it when it is imported
        os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))
    try:
        from minllama.kernels.compiled import CompiledLlama
    except ImportError as error:
        raise InputError(
            "--compile: needs Numba; install it with `python -m pip install -r "
            "requirements-extra.txt`, or leave it out"
        ) from error
    print("compiling the step of decoding, or taking it from the disk", file=sys.stderr)
    return CompiledLlama(llama, dtype)


class Texts:
    """Texts that grow as one iterates; each step is a token of every row that has not ended.

    Args:
        generator: the model and its tokenizer.
        prompts: what is continued.
        stop: a text ends before the first of these that it adds.

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
        all_rows = range(len(self.rows))
        if self.llama.config.causal:
            stop_ids = (self.tokenizer.bos_id, self.tokenizer.eos_id)
            steps = decode(self.llama, self.rows, *arguments, stop_ids, self._ended)
            yield from self._add(steps, all_rows)
        elif len(set(map(len, self.rows))) == 1:
            steps = decode_unmasked(self.llama, self.rows, *arguments)
            yield from self._add(steps, all_rows)
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
        """The part of a text that will stay. A beginning of a stop or of a character may go."""
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


def generator_of(settings: GenerateSettings, *, may_limit_threads: bool = False) -> TextGenerator:
    """The model and the tokenizer that the flags name."""
    compile = settings.compile
    if compile and not settings.use_gpu and (settings.num_samples or 1) > 1:
        warnings.warn("--compile: on a CPU several rows are not compiled", stacklevel=2)
        compile = False
    generator = TextGenerator(
        settings.pretrained_model_path,
        settings.tokenizer_path,
        causal=settings.causal,
        dtype=settings.dtype,
        use_gpu=settings.use_gpu,
        compile=compile,
        may_limit_threads=may_limit_threads,
    )
    generator.tokenizer.max_len = settings.max_sentence_len
    return generator


def continuations(
    generator: TextGenerator, settings: GenerateSettings, prompt: str, temperature: float
) -> Texts:
    """As many texts as the flags ask for that continue a prompt.

    Raises:
        InputError: the prompt is no text.
    """
    return Texts(
        generator,
        [prompt] * (settings.num_samples or 1),
        settings.sampling(temperature),
        settings.max_new_tokens,
        settings.stop or (),
    )


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
    is_unmasked = not generator.llama.config.causal
    if is_unmasked and temperature > 0:
        draw_initial_weights(generator.llama)
    texts = continuations(generator, settings, settings.prefix, temperature)
    n_samples = len(texts.rows)
    start = time.perf_counter()
    interrupted = show(texts, is_live=sys.stdout.isatty() and n_samples == 1, desc="generate")
    seconds = time.perf_counter() - start
    with atomic_write(outfile) as file:
        file.write(f"\n{LINE}\n".join(texts.text(row) for row in range(n_samples)))
    what = "sentence" if n_samples == 1 else "sentences"
    print(f"Wrote generated {what} to {outfile}.", flush=True)
    tell_speed(generator, texts.n_new, seconds)
    if interrupted:
        raise KeyboardInterrupt
    if is_unmasked and temperature == 0:
        draw_initial_weights(generator.llama)


def show(texts: Texts, *, is_live: bool, desc: str | None = None) -> bool:
    """Let texts grow, and print them with a line below. Warnings come behind them.

    Args:
        is_live: print the only text piece by piece, as it grows.
        desc: what the bar is called that is shown otherwise; None is for no bar.

    Returns:
        whether Ctrl-C ended them early.
    """
    stream, interrupted = TextStream(), False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = Bar(texts, total=texts.max_new_tokens, desc=desc, disable=is_live or desc is None)
        try:
            for _ in steps:
                if is_live:
                    stream.show(texts.settled(0))
        except KeyboardInterrupt:
            interrupted = True
    stream.show(texts.text(0))
    print()
    for row in range(1, len(texts.rows)):
        print(LINE)
        print(texts.text(row))
    for warning in caught:
        warnings.warn(warning.message, stacklevel=2)
    print(LINE, flush=True)
    return interrupted


def tell_speed(generator: TextGenerator, n_new: int, seconds: float) -> None:
    """Say on standard error how fast tokens came, and the peak memory."""
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
    sys.stdin.reconfigure(errors="surrogateescape")  # a bad line is refused, and the next may not
    if is_terminal:
        print("Ctrl-C ends a text, Ctrl-D leaves", file=sys.stderr)
    while True:
        try:
            prompt = ask() if is_terminal else input()
        except EOFError:
            if is_terminal:
                print(file=None if sys.stdout.isatty() else sys.stderr)
            return
        try:
            texts = continuations(generator, settings, prompt, settings.one_temperature)
            interrupted = show(texts, is_live=len(texts.rows) == 1)
        except InputError as error:  # the next prompt may be shorter
            print_error(str(error))
            continue
        if interrupted and not is_terminal:
            raise KeyboardInterrupt


def ask() -> str:
    """A line from the terminal, behind a sign that does not go into a file."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


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


def generate(settings: GenerateSettings) -> None:
    """Write the assignment's two texts, at temperature 0 and at temperature 1, or what is asked."""
    distributed.require_one_process("generate")
    with explain_out_of_memory("generating", LESS_MEMORY):
        write_texts(settings)


def write_texts(settings: GenerateSettings) -> None:
    """Write the texts that the settings ask for."""
    settings.check()
    if settings.interactive:
        converse(generator_of(settings, may_limit_threads=True), settings)
        return
    outputs = {
        0.0: settings.generated_sentence_low_temp_out,
        1.0: settings.generated_sentence_high_temp_out,
    }
    if settings.is_one:
        outputs = {settings.one_temperature: settings.generated_sentence_high_temp_out}
    inputs = [settings.pretrained_model_path]
    if settings.tokenizer_path is not None:
        inputs.append(settings.tokenizer_path)
    check_outputs(outputs.values(), inputs)
    generator = generator_of(settings, may_limit_threads=True)
    for temperature, outfile in outputs.items():
        write(generator, settings, outfile, temperature)


class TextStream:
    """Prints of a growing text what is new."""

    def __init__(self):
        self.n_shown = 0

    def show(self, text: str) -> None:
        """Print what a text has more than the last."""
        print(text[self.n_shown :], end="", flush=True)
        self.n_shown = max(self.n_shown, len(text))
