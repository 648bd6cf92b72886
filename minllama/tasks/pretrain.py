"""`--option pretrain`: train a language model on plain text, from nothing or from a checkpoint."""

import argparse
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import LlamaConfig
from llama import Llama, load_pretrained
from minllama.checkpoints.pt import model_args_of, write_checkpoint
from minllama.common.errors import InputError, missing_file
from minllama.common.files import LARGE, SAMPLE, atomic_write, check_outputs, file_fingerprint
from minllama.common.flags import TrainSettings
from minllama.common.progress import Bar, Pace
from minllama.common.settings import flag
from minllama.evaluation.classification import append_metrics
from minllama.evaluation.language_model import NextTokenScores, Tally, describe
from minllama.evaluation.plot import check_picture, draw, read_metrics
from minllama.kernels.adamw import FastAdamW
from minllama.kernels.cpu import accelerate
from minllama.text.documents import SPLITS, TextSize, measure, split_chunks
from minllama.text.sequences import IGNORED, EvaluationSequences, TrainingSequences
from minllama.text.token_files import SUFFIX, open_token_files
from minllama.text.tokenized import TokenizedText, tokenize
from minllama.text.tokenizer_training import train_tokenizer
from minllama.training import distributed, state
from minllama.training.activation_checkpointing import checkpoint_activations
from minllama.training.folder import (
    METRICS,
    MODEL,
    TOKENIZER,
    TOKENS,
    metrics_until,
    open_run,
)
from minllama.training.step import (
    check_dtype,
    check_finite,
    compile_layers,
    learning_rate,
    mixed_precision,
    update,
)
from tokenizer import Tokenizer, check_vocabulary
from utils import best_device, pick_device, to_device

SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "multiple_of", "max_seq_len")
NOT_OF_THE_RESULT = {"text", "output_dir"}  # own flags that it does not depend on by name
MOST_WARMUP = 100  # steps, where --warmup_steps is not given
SHARED = ("seed", "batch_size", "lr", "dtype", "grad_accum")  # others' flags that it depends on


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TrainSettings):
    """A text, the shape of a model, and how it is trained."""

    title = "pretrain"
    description = (
        "Trains a causal language model on --text; from --pretrained-model-path where that is "
        "given, else from scratch. Runs on CUDA, else MPS, else the CPU; --use_gpu makes it an "
        "error that there is none of the first two."
    )
    demo = ()
    less_memory = TrainSettings.less_memory.replace("--max_sentence_len", "--max_seq_len")

    batch_size: int = flag(16, "rows per batch", low=1)
    lr: float = flag(1e-3, "learning rate")
    text: list[str] | None = flag(
        None,
        "plain text, with <|endoftext|> lines between documents, or labelled sentences; or token "
        "ids, in files *.bin as llama2.c and nanoGPT write them",
        nargs="+",
        metavar="FILE",
    )
    output_dir: str = flag(
        "pretrained",
        "folder for model.pt, tokenizer.model, metrics.jsonl; an interrupted run is continued",
        metavar="DIR",
    )
    split: tuple[float, float, float] = flag(
        (0.7, 0.15, 0.15),
        "shares of the text for training, validation and test",
        high=1,
        nargs=3,
        metavar="SHARE",
    )
    vocab_size: int = flag(
        2048, "pieces of the tokenizer that is trained, if no --tokenizer-path is given", low=1
    )
    dim: int = flag(256, "width of the residual stream", low=1)
    n_layers: int = flag(6, "number of layers", low=1)
    n_heads: int = flag(4, "number of query heads", low=1)
    n_kv_heads: int | None = flag(None, "key and value heads (default: as --n_heads)", low=1)
    hidden_dim: int | None = flag(
        None, "width of the feed-forward layers (default: 8/3 of --dim)", low=1
    )
    multiple_of: int = flag(32, "--hidden_dim's default is rounded up to it", low=1)
    max_seq_len: int | None = flag(
        None, "context in tokens, and length of the rows (default: 256, or the checkpoint's)", low=1
    )
    dropout: float = flag(0.0, "of embeddings and sub-layers", high=1)
    attention_dropout: float | None = flag(
        None, "of attention weights (default: as --dropout)", high=1
    )
    steps: int = flag(1000, "steps of the optimizer", low=1)
    warmup_steps: int | None = flag(
        None, "steps in which --lr is reached (default: a tenth of all, 100 at most)"
    )
    min_lr: float = flag(
        0.0, "where the cosine decay of --lr ends; the same as --lr keeps it constant"
    )
    weight_decay: float = flag(0.1, "weight decay of the matrices")
    grad_clip: float = flag(1.0, "largest gradient norm; 0 turns clipping off")
    eval_every: int | None = flag(
        None, "steps between reports (default: a twentieth of all)", low=1
    )
    eval_batches: int = flag(50, "validation batches read for each report", low=1)
    save_dtype: str = flag(
        "float32", "of the weights in model.pt", choices=("float32", "bfloat16", "float16")
    )

    @property
    def start_from(self) -> str | None:
        """The checkpoint to train further, or None."""
        return self.pretrained_model_path if "pretrained_model_path" in self.explicit else None

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoint to train further, and those of an earlier part of the run."""
        own = [str(Path(self.output_dir) / name) for name in (MODEL, state.FILE)]
        own = [path for path in own if Path(path).is_file()]
        return [*([self.start_from] if self.start_from else []), *own]

    @property
    def is_tokenized(self) -> bool:
        """Whether --text names files of token ids."""
        return any(Path(path).suffix == SUFFIX for path in self.text)

    @property
    def given_tokenizer(self) -> str | None:
        """The tokenizer that is not trained, or None."""
        has_tokenizer = self.start_from or "tokenizer_path" in self.explicit
        return self.tokenizer_path if has_tokenizer else None

    def shape(self) -> dict:
        """The arguments of `LlamaConfig` for a model from scratch, without the vocabulary."""
        shape = {name: getattr(self, name) for name in SHAPE}
        return shape | {"max_seq_len": self.max_seq_len or 256}

    def check(self) -> None:
        """See that the flags describe a run.

        Raises:
            FileNotFoundError: a file is absent.
            InputError: a flag is wrong, or two do not go together.
        """
        if not self.text:
            raise InputError("--text: pre-training needs a text; name one or more files")
        for path in self.text:
            if not Path(path).is_file():
                raise missing_file(path)
        if self.start_from is not None and not Path(self.start_from).exists():
            raise missing_file(self.start_from)
        if self.given_tokenizer is not None and not Path(self.given_tokenizer).is_file():
            raise missing_file(self.given_tokenizer)
        if self.is_tokenized:
            self._check_token_files()
        if self.causal is False:
            raise InputError(
                "--no-causal: a language model learns with the causal mask; leave it out"
            )
        check_dtype(self.dtype)
        if self.split[0] == 0:
            raise InputError("--split: the training part needs a share greater than 0")
        if self.given_tokenizer and "vocab_size" in self.explicit:
            raise InputError(
                f"--vocab_size: {self.given_tokenizer} has a size of its own; leave it out"
            )
        fixed = sorted(set(SHAPE) & set(self.explicit) - {"max_seq_len"})
        if self.start_from and fixed:
            flags = ", ".join(f"--{name}" for name in fixed)
            raise InputError(f"{flags}: {self.start_from} has a shape of its own; leave that out")
        if self.plot is not None:
            check_picture(self.plot)
            check_outputs([self.plot], [*self.text, *self.checkpoints])
        try:
            dropout = {"dropout": self.dropout, "attention_dropout": self.attention_dropout}
            LlamaConfig(**dropout, **self.shape()).check()
        except ValueError as error:
            raise InputError(f"no such model: {error}") from error

    def _check_token_files(self) -> None:
        texts = [path for path in self.text if Path(path).suffix != SUFFIX]
        if texts:
            raise InputError(
                f"--text {texts[0]}: stands among files of token ids ({SUFFIX}); give either only "
                "texts or only token ids"
            )
        if self.given_tokenizer is None:
            raise InputError(
                f"--text {self.text[0]}: token ids need the tokenizer that made them; name it with "
                "--tokenizer-path"
            )
        own = (Path(self.output_dir) / TOKENS).resolve()
        if any(Path(path).resolve().parent == own for path in self.text):
            raise InputError(
                f"--text {self.text[0]}: a file of the run in {self.output_dir}; name another "
                "--output_dir"
            )

    def fingerprint(self) -> dict:
        """All that the result depends on, as JSON has it."""
        own = PretrainSettings.defaults().keys() - TrainSettings.defaults().keys()
        names = [*SHARED, *sorted(own - NOT_OF_THE_RESULT)]
        settings = {name: getattr(self, name) for name in names}
        settings["files"] = self._fingerprints
        return json.loads(json.dumps(settings))

    @functools.cached_property
    def _fingerprints(self) -> list[str]:
        large = SAMPLE if self.is_tokenized else LARGE  # there may be hundreds of token files
        others = [file for file in (self.start_from, self.given_tokenizer) if file is not None]
        texts = [file_fingerprint(file, large) for file in self.text]
        return texts + [file_fingerprint(file) for file in others]

    def goes_on(self, before: dict) -> bool:
        """Whether a run with former settings takes more steps, with the rates that it had."""
        now = self.fingerprint()
        try:
            longer = self.replace(**{key: before[key] for key in ("steps", "warmup_steps")})
        except (InputError, KeyError):
            return False
        return (
            {**before, "steps": None} == {**now, "steps": None}
            and longer.steps <= self.steps
            and self.lr == self.min_lr
            and all(
                longer.learning_rate(step) == self.learning_rate(step)
                for step in range(min(longer.steps, MOST_WARMUP))
            )
        )

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to `lr`, then cosine decay to `min_lr`.

        Args:
            step: the number of steps taken before.
        """
        n_warmup = (
            min(MOST_WARMUP, self.steps // 10) if self.warmup_steps is None else self.warmup_steps
        )
        return learning_rate(step, self.steps, n_warmup, self.lr, self.min_lr)


def pretrain(args: argparse.Namespace) -> None:
    """Train on `args.text`; leave the best weights, the tokenizer and all reports in a folder.

    The folder's `model.pt` has the layout of `stories42M.pt`, with `causal: True`, and its
    `tokenizer.model` stands beside it, so that every other option takes it. A run that was
    interrupted, however it was, goes on from its last report when it is started again; on a CPU,
    with the same number of threads, to the same weights as without the interruption.

    Raises:
        InputError: a setting or the text does not allow it; or the loss is not finite, in which
            case the weights of the last report stay.
    """
    settings = PretrainSettings.from_args(args)
    settings.check()
    fingerprint = settings.fingerprint()
    distributed.agree(fingerprint)
    device = pick_device(True) if settings.use_gpu else best_device()
    llama = load_pretrained(settings.start_from, causal=True) if settings.start_from else None
    given = load_given_tokenizer(settings, llama)
    folder = Path(settings.output_dir)
    is_first = distributed.is_first()
    reads = [
        path for path in (*settings.text, settings.start_from, settings.given_tokenizer) if path
    ]
    held = nullcontext()
    if is_first:
        held = open_run(folder, fingerprint, settings.goes_on, reads)
    with held:
        tokenizer, texts = distributed.first_alone(lambda: prepare_texts(settings, given, folder))
        for name, text in texts.items():
            print(f"{name}: {text.describe()}")
        if llama is None:
            llama = Llama(
                LlamaConfig(vocab_size=tokenizer.n_words, causal=True, **settings.shape())
            )
        set_dropout(llama, settings.dropout, settings.attention_dropout)
        accelerate(llama)
        if settings.activation_checkpointing:
            checkpoint_activations(llama.layers)
        llama = llama.to(device)
        if settings.compile:
            compile_layers(llama.layers)
        n_parameters = sum(parameter.numel() for parameter in llama.parameters())
        print(f"{n_parameters:,} parameters on {device}{distributed.describe()}")
        run = Pretraining(settings, llama, texts, folder)
        try:
            run.train()
        except KeyboardInterrupt:
            print("interrupted; the same command continues from the last report", file=sys.stderr)
            raise
        if "test" in texts:
            run.test(texts["test"])
        if settings.plot is not None:
            runs = {settings.output_dir: read_metrics(folder / METRICS)} if is_first else {}
            distributed.on_first(lambda: draw(runs, settings.plot))


def load_given_tokenizer(settings: PretrainSettings, llama: Llama | None) -> Tokenizer | None:
    """The tokenizer that --tokenizer-path names or that belongs to the checkpoint."""
    if settings.given_tokenizer is None:
        return None
    given = Tokenizer(tokenizer_model=settings.given_tokenizer)
    vocab_size = given.n_words if llama is None else llama.vocab_size
    check_vocabulary(given, vocab_size, settings.pretrained_model_path)
    return given


def prepare_texts(
    settings: PretrainSettings, given: Tokenizer | None, folder: Path
) -> tuple[Tokenizer, dict[str, TokenizedText]]:
    """The tokenizer and the ids of each part: made from the text, or found in the folder.

    What is found there is not made again, and the text is then not measured.
    """
    measured = None
    if given is None and not (folder / TOKENIZER).is_file():
        measured = measure(settings.text)
    tokenizer = prepare_tokenizer(settings, given, folder, measured)
    if settings.is_tokenized:
        return tokenizer, open_token_files(settings.text, settings.split, tokenizer)
    return tokenizer, tokenize(settings.text, settings.split, measured, tokenizer, folder / TOKENS)


def prepare_tokenizer(
    settings: PretrainSettings,
    given: Tokenizer | None,
    folder: Path,
    measured: TextSize | None,
) -> Tokenizer:
    """Put the tokenizer into the folder: the given one, or one trained on the text.

    Args:
        measured: what `measure` returned; needed if one is trained.
    """
    path = folder / TOKENIZER

    def training_part() -> Iterator[str]:
        for split, chunk in split_chunks(settings.text, settings.split, measured):
            if split == "train":
                yield chunk.text

    if path.is_file():
        return Tokenizer(tokenizer_model=path)
    if given is not None:
        with atomic_write(path, "wb") as file:
            file.write(given.model_path.read_bytes())
    else:
        train_tokenizer(training_part, settings.vocab_size, path)
    return Tokenizer(tokenizer_model=path)


def set_dropout(llama: Llama, dropout: float, attention_dropout: float | None) -> None:
    config = llama.config
    config.dropout = dropout
    config.attention_dropout = dropout if attention_dropout is None else attention_dropout
    for module in llama.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout


def n_batches(n_rows: int, batch_size: int) -> int:
    """The batches of an epoch. Rows that do not fill one are left out, unless there is no other.

    A smaller last batch would weigh too much.
    """
    return max(1, n_rows // batch_size)


def batches_of(order: torch.Tensor, batch_size: int, skip: int) -> Iterator[list[int]]:
    """The rows of each batch of an epoch, made as they are asked for, without the first batches."""
    for i in range(skip, n_batches(len(order), batch_size)):
        yield order[i * batch_size : (i + 1) * batch_size].tolist()


Batch = tuple[torch.Tensor, torch.Tensor]  # tokens and targets, each `(batch, seqlen)`


class Pretraining:
    """The loop: model, optimizer and position in the text, saved whole at every report."""

    def __init__(
        self,
        settings: PretrainSettings,
        llama: Llama,
        texts: dict[str, TokenizedText],
        folder: Path,
    ):
        self.settings, self.llama, self.texts, self.folder = settings, llama, texts, folder
        self.fingerprint = settings.fingerprint()
        self.device = next(llama.parameters()).device
        self.seqlen = settings.max_seq_len or llama.config.max_seq_len
        if self.seqlen > llama.config.max_seq_len:
            raise InputError(
                f"--max_seq_len {self.seqlen}: the context of {settings.pretrained_model_path} is "
                f"{llama.config.max_seq_len}"
            )
        if len(texts["train"]) <= self.seqlen:
            raise InputError(
                f"a context of {self.seqlen} tokens is longer than the training part's "
                f"{len(texts['train'])}; lower --max_seq_len or give more text"
            )
        if settings.grad_accum > len(texts["train"]) // self.seqlen:
            raise InputError(
                f"--grad_accum {settings.grad_accum}: a step would be more batches than the "
                f"training part has rows of {self.seqlen} tokens; lower it or give more text"
            )
        is_sharded = settings.shard and distributed.shard(llama, llama.layers, settings.dtype)
        self.dtype = "float32" if is_sharded else settings.dtype  # of autocast
        parameters = list(llama.parameters())
        matrices = [p for p in parameters if p.dim() >= 2]
        scales = [p for p in parameters if p.dim() < 2]
        self.optimizer = FastAdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": scales}],
            lr=settings.lr,
            betas=(0.9, 0.99),  # a longer memory than 0.95, for the small batches of a CPU
        )
        self.step = 0
        self.best_loss = math.inf
        self.seconds = 0.0
        self._load()
        if self.step == 0:
            self._save()  # so that there is no model without a state to continue from
        self.model = distributed.data_parallel(llama, all_used=True)

    def train(self) -> None:
        """Take the remaining steps."""
        settings = self.settings
        eval_every = settings.eval_every or max(1, settings.steps // 20)
        batches = self._batches(skip=self.step * settings.grad_accum)
        tally, losses = Tally(), []
        self.llama.train()
        last_time = time.perf_counter()
        n_steps = settings.steps - self.step
        self.pace = Pace(n_steps, math.ceil(n_steps / eval_every))
        with Bar(desc="train", total=settings.steps, initial=self.step) as progress:
            while self.step < settings.steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = settings.learning_rate(self.step)
                of_this_step = list(itertools.islice(batches, settings.grad_accum))
                with distributed.own_draws(settings.seed, self.step, self.device):
                    loss = update(
                        self.llama,
                        self._losses(of_this_step, tally),
                        self.optimizer,
                        f"step {self.step + 1}",
                        settings.grad_clip or None,
                    )
                losses.append(loss)
                self.step += 1
                self.pace.record("step")
                known = loss.item() if loss.device.type == "cpu" else None
                progress.report(known, self.pace.seconds_left)
                progress.update()
                if self.step % eval_every == 0 or self.step == settings.steps:
                    check_finite(torch.stack(losses), f"the steps to {self.step}")
                    now = time.perf_counter()
                    self.seconds += now - last_time
                    self._report(tally, now - last_time)
                    self._save()
                    self.pace.record("pause")
                    tally, losses = Tally(), []
                    last_time = time.perf_counter()

    def test(self, text: TokenizedText) -> None:
        """Evaluate the best weights on the whole of a text, and report it."""
        self.llama = load_pretrained(self.folder / MODEL, init_weights=False).to(self.device)
        accelerate(self.llama)
        if self.settings.shard and distributed.n_processes() > 1:
            distributed.shard(self.llama, self.llama.layers, self.settings.dtype)
        scores = self.evaluate(text)
        distributed.on_first(lambda: append_metrics(self.folder / METRICS, test=scores))
        print(f"test: {describe(scores)}")

    def _losses(self, batches: Sequence[Batch], tally: Tally) -> Iterator[torch.Tensor]:
        """The loss of each batch, as a share of their mean; what they scored goes to the tally."""
        for i, batch in enumerate(batches, start=1):
            distributed.add_up_now(self.model, i == len(batches))
            n_targets = (batch[1] != IGNORED).sum()
            share, counts = distributed.share(*batch)
            scores = self._score(share, self.model, n_targets)
            if counts:
                tally.add(scores)
            yield scores.loss * counts / len(batches)

    def _score(
        self, batch: Batch, model: nn.Module, n_targets: torch.Tensor | None = None
    ) -> NextTokenScores:
        tokens, targets = (to_device(part, self.device) for part in batch)
        with mixed_precision(self.device, self.dtype):
            logits, _ = model(tokens, targets)
        return NextTokenScores(logits, targets, self.texts["train"].bos_id, n_targets)

    def _batches(self, skip: int) -> Iterator[Batch]:
        """Rows of the training part in random order, epoch after epoch, without the first batches.

        The order depends on seed and epoch only.
        """
        for epoch in itertools.count():
            generator = torch.Generator().manual_seed(self.settings.seed + epoch)
            offset = int(torch.randint(self.seqlen, (), generator=generator))
            rows = TrainingSequences(self.texts["train"], self.seqlen, offset)
            order = torch.randperm(len(rows), generator=generator)
            batches = batches_of(order, self.settings.batch_size, skip)
            # Given a generator of its own, the loader leaves the global one to the dropout.
            yield from DataLoader(rows, batch_sampler=batches, generator=generator)
            skip = max(0, skip - n_batches(len(rows), self.settings.batch_size))

    def _report(self, tally: Tally, seconds: float) -> None:
        """Evaluate, tell how it goes, and keep the weights if they are the best so far."""
        settings = self.settings
        record = {"step": self.step, "lr": settings.learning_rate(self.step - 1)}
        record["train"] = tally.scores(self.texts["train"].tokens_per_byte)
        if "validation" in self.texts:
            n_rows = settings.eval_batches * settings.batch_size
            record["validation"] = self.evaluate(self.texts["validation"], n_rows)
            if not math.isfinite(record["validation"]["loss"]):
                raise InputError(
                    f"the validation loss is not finite at step {self.step}; lower --lr"
                )
        if "validation" not in record or record["validation"]["loss"] < self.best_loss:
            self.best_loss = record.get("validation", record["train"])["loss"]
            self._save_model()
        record["seconds"] = self.seconds
        record["tokens_per_second"] = tally.n_targets / seconds
        distributed.on_first(lambda: append_metrics(self.folder / METRICS, **record))
        parts = [f"{name} {describe(record[name])}" for name in SPLITS if name in record]
        left = tqdm.format_interval(self.pace.seconds_left)
        tqdm.write(
            f"step {self.step}/{settings.steps}: {' | '.join(parts)} | "
            f"{record['tokens_per_second']:,.0f} tokens/s, {left} left"
        )
        sys.stdout.flush()

    def evaluate(self, text: TokenizedText, n_rows: int | None = None) -> dict[str, float]:
        """Score a text, or some rows of it, evenly spaced."""
        self.llama.eval()
        tally = Tally()
        rows = EvaluationSequences(text, self.seqlen, n_rows)
        loader = DataLoader(rows, self.settings.batch_size, generator=torch.Generator())
        with torch.inference_mode():
            progress = Bar(loader, desc="evaluate")
            for _, batch, counts in distributed.rounds(progress):
                scores = self._score(batch, self.llama)
                if counts:
                    tally.add(scores)
        self.llama.train()
        return tally.scores(text.tokens_per_byte)

    def _save_model(self) -> None:
        """Write the weights in the layout of `stories42M.pt`."""
        dtype = getattr(torch, self.settings.save_dtype)
        weights = distributed.whole(self.llama.state_dict())
        if not distributed.is_first():
            return
        weights = {name: tensor.detach().to("cpu", dtype) for name, tensor in weights.items()}
        if self.llama.config.tie_embeddings:  # stored once
            weights["tok_embeddings.weight"] = weights["output.weight"]
        saved = {
            "model": weights,
            "model_args": model_args_of(self.llama.config),
            "iter_num": self.step,
            "best_val_loss": torch.tensor(self.best_loss),
            "config": self.fingerprint,
        }
        write_checkpoint(saved, self.folder / MODEL)

    def _save(self) -> None:
        values = {
            "step": self.step,
            "best_loss": self.best_loss,
            "seconds": self.seconds,
            "settings": self.fingerprint,
            "torch_rng": torch.get_rng_state(),
        }
        if self.device.type != "cpu":
            values["device_rng"] = torch.get_device_module(self.device).get_rng_state()
        state.save(self.folder, self.llama, self.optimizer, values)

    def _load(self) -> None:
        """Go back to the last report, if there was one."""
        schema = {"step": int, "best_loss": float, "seconds": (int, float), "settings": dict}
        schema["torch_rng"] = torch.get_rng_state()
        state.load(self.folder, self.llama, self.optimizer, schema, self._take_up)
        distributed.on_first(lambda: metrics_until(self.folder / METRICS, self.step))

    def _take_up(self, saved: dict[str, Any]) -> None:
        before = saved["settings"]
        if before != self.fingerprint and not self.settings.goes_on(before):
            found = state.newest(self.folder)
            raise InputError(f"{found}: not this run's; name another --output_dir")
        if saved["step"] > 0 and not (self.folder / MODEL).is_file():
            raise InputError(f"{self.folder}: its {MODEL} is gone; name another --output_dir")
        self.step, self.best_loss = saved["step"], saved["best_loss"]
        self.seconds = saved["seconds"]
        torch.set_rng_state(saved["torch_rng"])
        if "device_rng" in saved and self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(saved["device_rng"])
        print(f"continuing from step {self.step} in {self.folder}")
