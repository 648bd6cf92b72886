"""`--option pretrain`: train a language model on plain text, from scratch or from a checkpoint."""

import functools
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from config import LlamaConfig
from llama import Llama, load_pretrained
from minllama.checkpoints.formats import find_tokenizer
from minllama.common.errors import InputError, explain_out_of_memory, missing_file
from minllama.common.files import LARGE, SAMPLE, check_outputs, file_fingerprint
from minllama.common.flags import LESS_TRAINING_MEMORY, SHAPE, ShapeSettings, TrainSettings
from minllama.common.program import survive_closed_stdout
from minllama.common.progress import progress_bar
from minllama.common.settings import flag
from minllama.evaluation.language_model import (
    evaluate,
    format_scores,
    next_token_loss,
    scores_of,
    total_counts,
)
from minllama.evaluation.metrics import append_metrics, read_metrics
from minllama.evaluation.plot import check_picture, draw
from minllama.kernels.adamw import FastAdamW
from minllama.kernels.cpu import accelerate, keep_freed_memory
from minllama.text.corpus import prepare_corpus
from minllama.text.documents import SPLITS
from minllama.text.sequences import EvaluationSequences, check_lengths, training_batches
from minllama.text.token_files import TokenizedText, check_token_files, holds_token_ids
from minllama.training import distributed
from minllama.training.precision import (
    check_finite,
    clip_gradients,
    mixed_precision,
)
from minllama.training.prepare import prepare_for_training, set_dropout
from minllama.training.run_folder import RunFolder
from minllama.training.schedule import ScheduleSettings
from tokenizer import Tokenizer, check_vocabulary
from utils import best_device, pick_device, to_device

SHARED_FINGERPRINT = ("seed", "batch_size", "lr", "dtype", "grad_accum")
NOT_IN_FINGERPRINT = {"text", "output_dir"}


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(ScheduleSettings, ShapeSettings, TrainSettings):
    """The flags of pre-training: a text, the shape of a model, and how it is trained."""

    title = "pretrain"
    description = (
        "Trains a causal language model on --text (documents between <|endoftext|> lines), from "
        "--pretrained-model-path if given, else from scratch. Runs on CUDA, else MPS, else the "
        "CPU; --use_gpu makes it an error if neither of the first two is available."
    )

    batch_size: int = flag(16, "sequences per batch", low=1)
    text: list[str] | None = flag(
        None,
        "text, labelled sentences, or token ids (*.bin) to train on",
        nargs="+",
        metavar="FILE",
    )
    output_dir: str = flag(
        "pretrained",
        "folder for model.pt, tokenizer.model, metrics.jsonl; an interrupted run is resumed",
        metavar="DIR",
    )
    split: tuple[float, float, float] = flag(
        (0.7, 0.15, 0.15),
        "fractions of the text for training, validation and test",
        high=1,
        nargs=3,
        metavar="FRACTION",
    )
    vocab_size: int = flag(2048, "vocabulary size of the tokenizer to train", low=1, high=10**7)
    eval_every: int | None = flag(
        None, "optimizer steps between evaluations (default: a twentieth of --steps)", low=1
    )
    eval_batches: int = flag(50, "validation batches per report", low=1)
    save_dtype: str = flag(
        "float32", "dtype of the weights in model.pt", choices=("float32", "bfloat16", "float16")
    )

    @property
    def start_from(self) -> str | None:
        """The checkpoint to continue from, or None."""
        return self.pretrained_model_path if "pretrained_model_path" in self.explicit else None

    @property
    def existing_tokenizer(self) -> str | None:
        """The tokenizer to use, or None if one is trained."""
        has_tokenizer = self.start_from or "tokenizer_path" in self.explicit
        return self.tokenizer_path if has_tokenizer else None

    @property
    def inputs(self) -> list[str]:
        """All files that the run reads."""
        paths = [*(self.text or ()), self.start_from, self.existing_tokenizer]
        return [path for path in paths if path is not None]

    def resolved(self) -> "PretrainSettings":
        path = self.tokenizer_path or find_tokenizer(self.pretrained_model_path)
        return self.replace(tokenizer_path=path)

    def check(self) -> None:
        """Check, before any work, that the flags describe a run.

        Raises:
            FileNotFoundError: a file is absent.
            InputError: a flag is wrong, or two cannot be combined.
        """
        if not self.text:
            raise InputError("--text: pre-training needs a text; name one or more files")
        for path in self.inputs:
            if not Path(path).is_file() and not (path == self.start_from and Path(path).exists()):
                raise missing_file(path)
        check_token_files(self.text, self.existing_tokenizer)
        if self.causal is False:
            raise InputError("--no-causal: a language model needs the causal mask; leave it out")
        if self.split[0] == 0:
            raise InputError("--split: the training fraction must be greater than 0")
        if self.min_lr > self.lr:
            raise InputError(f"--min_lr {self.min_lr}: greater than --lr {self.lr}, lower it")
        if self.n_warmup > self.steps:
            raise InputError(f"--warmup_steps {self.n_warmup}: more than --steps; lower it")
        if self.existing_tokenizer and "vocab_size" in self.explicit:
            raise InputError(
                f"--vocab_size: {self.existing_tokenizer} fixes the vocabulary size; leave it out"
            )
        fixed = sorted(set(SHAPE) & set(self.explicit) - {"max_seq_len"})
        if self.start_from and fixed:
            flags = ", ".join(f"--{name}" for name in fixed)
            raise InputError(f"{flags}: {self.start_from} fixes the shape; leave that out")
        if self.plot is not None:
            check_picture(self.plot)
            check_outputs([self.plot], self.inputs)
        self.config(vocab_size=1)

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that the result depends on, as JSON values."""
        own = PretrainSettings.defaults().keys() - TrainSettings.defaults().keys()
        names = {*SHARED_FINGERPRINT, *own} - NOT_IN_FINGERPRINT
        text = self.text or []
        large = SAMPLE if holds_token_ids(text) else LARGE  # token files may be hundreds
        files = [file_fingerprint(path, large) for path in text]
        files += [file_fingerprint(path) for path in self.inputs[len(text) :]]
        values = {name: value for name, value in self.to_dict().items() if name in names}
        return values | {"files": files}

    def is_continuation(self, before: dict[str, Any]) -> bool:
        """Whether a run with another fingerprint only takes more steps, at the same rates."""
        shorter = self.replace(steps=before.get("steps"))
        return (
            before | {"steps": self.steps} == self.fingerprint
            and shorter.steps <= self.steps
            and shorter.n_warmup == self.n_warmup
            and self.lr == self.min_lr
        )


def pretrain(settings: PretrainSettings) -> None:
    """Train a language model; leave the best weights, the tokenizer and reports in a folder.

    `model.pt` in it has the layout of `stories42M.pt`, with `causal: True`, and every other option
    takes it. An interrupted run is resumed from its last report; on a CPU, with the same number of
    threads, it ends with the weights of an uninterrupted run.

    Raises:
        InputError: a setting or the text does not allow it; or the loss is not finite, in which
            case the weights of the last report stay.
    """
    settings.check()
    keep_freed_memory()
    memory_hint = LESS_TRAINING_MEMORY.replace("--max_sentence_len", "--max_seq_len")
    with explain_out_of_memory("pre-training", memory_hint), survive_closed_stdout():
        distributed.assert_same_on_all_ranks(settings.fingerprint)
        llama = load_pretrained(settings.start_from, causal=True) if settings.start_from else None
        existing = load_tokenizer(settings, llama)
        folder = RunFolder(settings.output_dir, settings.fingerprint, settings.is_continuation)
        with folder.open(settings.inputs):
            tokenizer, texts = distributed.rank0_first(
                lambda: prepare_corpus(
                    settings.text or [],
                    settings.split,
                    settings.vocab_size,
                    existing,
                    folder.tokenizer,
                    folder.tokens,
                )
            )
            for name, text in texts.items():
                print(f"{name}: {text.describe()}")
            llama = llama or Llama(settings.config(tokenizer.n_words))
            try:
                train_steps(settings, llama, texts, folder)
            except KeyboardInterrupt:
                print("interrupted; the same command resumes the run", file=sys.stderr)
                raise
            if settings.plot is not None and distributed.is_rank0():
                draw({settings.output_dir: read_metrics(folder.metrics)}, settings.plot)


def load_tokenizer(settings: PretrainSettings, llama: Llama | None) -> Tokenizer | None:
    """Load the tokenizer that is not trained, and check that it suits the checkpoint."""
    if settings.existing_tokenizer is None:
        return None
    tokenizer = Tokenizer(tokenizer_model=settings.existing_tokenizer)
    config = LlamaConfig(vocab_size=tokenizer.n_words) if llama is None else llama.config
    check_vocabulary(tokenizer, config, settings.pretrained_model_path)
    return tokenizer


def train_steps(
    settings: PretrainSettings, llama: Llama, texts: dict[str, TokenizedText], folder: RunFolder
) -> None:
    """Train or resume, and report and save at every `eval_every` steps; then test the best weights.

    Raises:
        InputError: a loss is not finite, or a flag does not suit the model or the text.
    """
    device = pick_device(True) if settings.use_gpu else best_device()
    seqlen = settings.max_seq_len or llama.config.max_seq_len
    check_lengths(seqlen, settings.grad_accum, llama.config.max_seq_len, len(texts["train"]))
    config, tokenizer = llama.config, texts["train"].tokenizer
    config.tokenizer = tokenizer.fingerprint
    config.bos_token_id, config.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
    set_dropout(llama, settings.dropout, settings.attention_dropout)
    accelerate(llama)
    llama = llama.to(device)
    dtype = prepare_for_training(llama, llama.layers, settings)
    n_parameters, n_processes = sum(p.numel() for p in llama.parameters()), distributed.world_size()
    where = f"{device} in {n_processes} processes" if n_processes > 1 else str(device)
    print(f"{n_parameters:,} parameters on {where}")
    matrices = [p for p in llama.parameters() if p.dim() >= 2]
    scales = [p for p in llama.parameters() if p.dim() < 2]
    optimizer = FastAdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": scales}],
        lr=settings.lr,
        betas=(0.9, 0.99),  # a longer memory than 0.95, for the small batches of a CPU
    )
    first_step, best_loss, seconds = folder.start_or_resume(llama, optimizer)
    text, bos_id = texts["train"], texts["train"].tokenizer.bos_id
    n_skipped = first_step * settings.grad_accum
    batches = training_batches(text, seqlen, settings.batch_size, settings.seed, n_skipped)
    eval_every = settings.eval_every or max(1, settings.steps // 20)
    bar = progress_bar(desc="train", total=settings.steps, initial=first_step)
    losses: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    start = time.perf_counter()

    for step in range(first_step, settings.steps):
        llama.train()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate(step)
        optimizer.zero_grad()
        step_loss = torch.zeros((), device=device)
        with distributed.rank_rng(settings.seed, step, device):
            for tokens, targets in itertools.islice(batches, settings.grad_accum):
                n_targets = targets.numel()  # tokens and targets: (batch, seqlen)
                mine, weight = distributed.local_slice(len(tokens))
                tokens, targets = to_device(tokens[mine], device), to_device(targets[mine], device)
                with mixed_precision(device, dtype):
                    logits, _ = llama(tokens, targets)  # (batch, seqlen, vocab_size)
                nats, batch_counts = next_token_loss(logits, targets, bos_id)
                del logits  # the backward pass does not need them, and they are large
                loss = nats / n_targets * weight / settings.grad_accum
                loss.backward()
                step_loss += loss.detach()
                if weight:
                    counts.append(batch_counts)
        distributed.sum_gradients(llama)
        distributed.sum_over_ranks(step_loss)
        if device.type == "cpu":  # on a GPU, reading the loss would wait for it
            check_finite(step_loss, f"step {step + 1}")
        if settings.grad_clip > 0:
            norm = clip_gradients(llama, settings.grad_clip, f"step {step + 1}")
            step_loss = torch.where(torch.isfinite(norm), step_loss, torch.nan)
        optimizer.step()
        losses.append(step_loss)
        if device.type == "cpu":
            bar.set_postfix(loss=f"{step_loss.item():.3f}", refresh=False)
        bar.update()

        if (step + 1) % eval_every == 0 or step + 1 == settings.steps:
            check_finite(torch.stack(losses), f"the steps to {step + 1}")
            train_seconds = time.perf_counter() - start
            seconds += train_seconds
            total = total_counts(counts)
            record: dict[str, Any] = {"step": step + 1, "lr": settings.learning_rate(step)}
            record["train"] = scores_of(total, text.tokens_per_byte)
            if "validation" in texts:
                n_sequences = settings.eval_batches * settings.batch_size
                validation = EvaluationSequences(texts["validation"], seqlen, n_sequences)
                record["validation"] = evaluate(llama, validation, settings.batch_size, dtype)
            loss = record.get("validation", record["train"])["loss"]
            if "validation" not in texts or loss < best_loss:
                best_loss = loss
                folder.save_model(llama, settings.save_dtype, step + 1, best_loss)
            record["seconds"] = seconds
            record["tokens_per_second"] = int(total[0]) / train_seconds
            distributed.on_rank0(functools.partial(append_metrics, folder.metrics, **record))
            by_split = [
                f"{name} {format_scores(record[name])}" for name in SPLITS if name in record
            ]
            tqdm.write(
                f"step {step + 1}/{settings.steps}: {' | '.join(by_split)} | "
                f"{record['tokens_per_second']:,.0f} tokens/s"
            )
            folder.save_state(llama, optimizer, step + 1, best_loss, seconds)
            losses, counts = [], []
            start = time.perf_counter()

    bar.close()
    if "test" in texts:
        folder.load_model(llama)
        scores = evaluate(
            llama, EvaluationSequences(texts["test"], seqlen), settings.batch_size, dtype
        )
        distributed.on_rank0(lambda: append_metrics(folder.metrics, test=scores))
        print(f"test: {format_scores(scores)}")
