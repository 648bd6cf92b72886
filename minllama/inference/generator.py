"""Text generation: a model with its tokenizer, texts in and texts out."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from llama import Llama, load_pretrained
from minllama.checkpoints.formats import find_tokenizer
from minllama.common.errors import InputError, needs_package
from minllama.inference.decoding import check_prompts, decode
from minllama.inference.sampling import Sampling
from minllama.kernels.batch1 import Batch1Llama
from minllama.kernels.cpu import accelerate
from minllama.kernels.quantize import BYTES, prepare_for_decoding
from tokenizer import Tokenizer, check_vocabulary
from utils import pick_device

MIN_BYTES_FOR_THREADS = 8 << 20  # of weights; with fewer a second thread hardly pays


class TextGenerator:
    """A model and its tokenizer.

        generator = TextGenerator("data/demo/model.pt", dtype="int8")
        generator.complete(["Once upon a time", "The old man"], Sampling(0.8, top_p=0.9))

    Args:
        checkpoint: any file or folder that `load_pretrained` takes.
        tokenizer_path: None takes the tokenizer beside the checkpoint, or else in the working
            folder.
        causal: overrides the checkpoint's mask setting.
        dtype: precision of the weights: float32, bfloat16 or int8.
        use_gpu: run on CUDA, or else MPS.
        compile: compile batch-1 decoding, which is available for a causal model on a CPU.
        limit_threads: let PyTorch use one thread if the model is small.

    Raises:
        FileNotFoundError, InputError: it cannot be loaded, or the tokenizer does not fit the model.
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
        limit_threads: bool = False,
    ):
        self.device = pick_device(use_gpu)
        # The weights stay in the file until they are converted, one layer after the other.
        llama = load_pretrained(checkpoint, causal=causal, init_weights=False, dtype=None)
        path = tokenizer_path or find_tokenizer(checkpoint)
        self.tokenizer = Tokenizer(tokenizer_model=path)
        check_vocabulary(self.tokenizer, llama.config, checkpoint)
        if limit_threads and llama.config.causal and self.device.type == "cpu":
            use_one_thread_if_small(llama, dtype)
        self.llama = prepare_for_inference(
            llama.to(self.device).eval(), dtype, self.device, compile
        )

    def complete(
        self,
        prompts: Sequence[str],
        sampling: Sampling | None = None,
        max_new_tokens: int = 75,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Continue prompts of any lengths, in one batch if the model is causal.

        Args:
            sampling: how tokens are drawn; None draws at temperature 1.
            stop: a text ends before the first of these in its continuation.

        Returns:
            the prompts with their continuations.

        Raises:
            InputError: a prompt is longer than the context, or not valid text.
        """
        if not prompts:
            return []
        batch = GenerationBatch(self, prompts, sampling or Sampling(), max_new_tokens, stop)
        for _ in batch:
            pass
        return [batch.text(row) for row in range(len(prompts))]


class GenerationBatch:
    """Texts that are being generated: each step of an iteration adds a token to the active rows.

    Args:
        generator: the model and its tokenizer.
        prompts: the texts to continue.
        stop: a text ends before the first of these in its continuation.

    Attributes:
        rows: ids of each text so far.
        n_new: number of tokens generated so far, in all rows.
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
        check_prompts(self.rows, self.llama.config)
        self.prompt_lengths = [len(self.tokenizer.decode(ids)) for ids in self.rows]
        self.n_new = 0

    def __iter__(self) -> Iterator[None]:
        is_causal = self.llama.config.causal
        stop_ids = (self.tokenizer.bos_id, self.tokenizer.eos_id) if is_causal else ()
        arguments = (self.llama, self.rows, self.max_new_tokens, self.sampling)
        for new in decode(*arguments, stop_ids, self._has_stop):
            for ids, token in zip(self.rows, new, strict=True):
                if token is not None:
                    ids.append(token)
                    self.n_new += 1
            yield

    def text(self, row: int) -> str:
        """The text of a row so far, up to its first stop."""
        text = self.tokenizer.decode(self.rows[row])
        return text[: self._find_stop(text, row)]

    def stable_prefix(self, row: int) -> str:
        """The part of a row's text that no later token changes, for streaming.

        Left out are an incomplete character, which decodes to replacement characters until its last
        byte comes, and the beginning of a stop.
        """
        text = self.tokenizer.decode(self.rows[row])
        end = self._find_stop(text, row)
        text = text[:end].rstrip("\N{REPLACEMENT CHARACTER}")
        if end is not None:
            return text
        n_open = 0
        for stop in self.stop:
            for n in range(1, len(stop)):
                if text.endswith(stop[:n]) and len(text) - n >= self.prompt_lengths[row]:
                    n_open = max(n_open, n)
        return text[: len(text) - n_open]

    def _has_stop(self, row: int, ids: list[int]) -> bool:
        return bool(self.stop) and self._find_stop(self.tokenizer.decode(ids), row) is not None

    def _find_stop(self, text: str, row: int) -> int | None:
        """Find where the first stop begins in the continuation of a row."""
        starts = [text.find(stop, self.prompt_lengths[row]) for stop in self.stop]
        return min((start for start in starts if start >= 0), default=None)


def prepare_for_inference(
    llama: Llama, dtype: str, device: torch.device, compile: bool
) -> Llama | Batch1Llama:
    """Put a model into its fastest form for a device and a precision.

    Without a mask and in float32 it stays the assignment's, to the digit.

    Raises:
        InputError: Numba, which compiling needs, does not work.
    """
    accelerate(llama)
    is_batch1 = llama.config.causal and device.type == "cpu"
    if compile and is_batch1:
        return compile_decoding(llama, dtype)
    if compile:
        where = f"on {device.type}" if llama.config.causal else "without a causal mask"
        warnings.warn(f"compiled decoding is not available {where}", stacklevel=3)
    if not llama.config.causal and dtype == "float32":
        return llama.float()
    prepare_for_decoding(llama, dtype)
    return Batch1Llama(llama) if is_batch1 else llama


def compile_decoding(llama: Llama, dtype: str) -> Batch1Llama:
    """Compile the batch-1 decoding of a model for the CPU.

    Raises:
        InputError: Numba is not installed, or does not compile.
    """
    if "numba" not in sys.modules:  # it reads the variable when it is imported
        os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))
    with needs_package("--compile", "Numba"):
        import numba

        from minllama.kernels.compiled import CompiledLlama

        numba.get_num_threads()  # starts them
    if numba.config.DISABLE_JIT:
        raise InputError("--compile: NUMBA_DISABLE_JIT keeps Numba from compiling; unset it")
    print("compiling the decoding step, or loading it from its cache", file=sys.stderr)
    return CompiledLlama(llama, dtype)


def use_one_thread_if_small(llama: Llama, dtype: str) -> None:
    """Set PyTorch's threads to one for a small model, unless `OMP_NUM_THREADS` is set.

    Threads wait for each other after every product. Next to another busy process each wait may take
    a time slice of the processor, and a small model decodes several times slower with two threads
    than with one (`benchmarks/threads.py`).
    """
    sizes = {id(p): p.numel() for p in llama.parameters()}  # a shared parameter counts once
    is_small = sum(sizes.values()) * BYTES[dtype] < MIN_BYTES_FOR_THREADS
    if is_small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
