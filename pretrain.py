"""`--option pretrain`: train a language model on plain text, from nothing or from a checkpoint."""

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from tqdm import tqdm

from base_llama import read_checkpoint, write_checkpoint
from config import LlamaConfig
from corpus import (
    IGNORED,
    PARTS,
    EvaluationRows,
    TokenizedText,
    TrainingRows,
    measure,
    split_chunks,
    tokenize,
    train_tokenizer,
)
from evaluation import append_metrics
from llama import Llama, load_pretrained
from optimizer import AdamW
from tokenizer import TOKENIZER_MODEL, Tokenizer, check_vocabulary
from training import (
    check_dtype,
    checkpoint_activations,
    mixed_precision,
    update,
    warmup_decay,
)
from utils import (
    InputError,
    adder,
    atomic_write,
    best_device,
    missing_file,
    number,
    pick_device,
)

SHAPE = ["dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "multiple_of", "max_seq_len"]
RECIPE = ["seed", "batch_size", "lr", "dtype", "split", "dropout", "attention_dropout", "steps"]
RECIPE += ["grad_accum", "warmup_steps", "min_lr", "weight_decay", "grad_clip"]
RECIPE += ["eval_every", "eval_batches", "save_dtype"]
SHARED_DEFAULTS = {"batch_size": 16, "lr": 1e-3}  # of flags that other options have too
MODEL, STATE, METRICS, RUN = "model.pt", "state.pt", "metrics.jsonl", "pretrain.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that only pre-training has."""
    group = parser.add_argument_group(
        "pre-training",
        "Trains a causal language model on --text; from --pretrained-model-path where that is "
        "given, else from scratch. --batch_size is 16 and --lr 1e-3 by default. Runs on CUDA, else "
        "MPS, else the CPU; --use_gpu makes it an error that there is none of the first two.",
    )
    add = adder(group)
    count, share, rate = number(int, 1), number(float, 0, 1), number(float, 0)
    help = "plain text, with <|endoftext|> lines between documents, or labelled sentences"
    add("--text", nargs="+", metavar="FILE", help=help)
    help = "folder for model.pt, tokenizer.model, metrics.jsonl; an interrupted run is continued"
    add("--output_dir", default="pretrained", metavar="DIR", help=help)
    help = "shares of the text for training, validation and test"
    add("--split", nargs=3, type=share, default=(0.7, 0.15, 0.15), metavar="SHARE", help=help)
    help = "pieces of the tokenizer that is trained, if no --tokenizer-path is given"
    add("--vocab_size", type=count, default=2048, help=help)
    add("--dim", type=count, default=256, help="width of the residual stream")
    add("--n_layers", type=count, default=6, help="number of layers")
    add("--n_heads", type=count, default=4, help="number of query heads")
    add("--n_kv_heads", type=count, help="key and value heads (default: as --n_heads)")
    add("--hidden_dim", type=count, help="width of the feed-forward layers (default: 8/3 of --dim)")
    add("--multiple_of", type=count, default=32, help="--hidden_dim's default is rounded up to it")
    help = "context in tokens, and length of the rows (default: 256, or the checkpoint's)"
    add("--max_seq_len", type=count, help=help)
    add("--dropout", type=share, default=0.0, help="of embeddings and sub-layers")
    add("--attention_dropout", type=share, help="of attention weights (default: as --dropout)")
    add("--steps", type=count, default=1000, help="steps of the optimizer")
    help = "steps in which --lr is reached (default: a tenth of all, 100 at most)"
    add("--warmup_steps", type=number(int, 0), help=help)
    help = "where the cosine decay of --lr ends; the same as --lr keeps it constant"
    add("--min_lr", type=rate, default=0.0, help=help)
    add("--weight_decay", type=rate, default=0.1, help="weight decay of the matrices")
    add("--grad_clip", type=rate, default=1.0, help="largest gradient norm; 0 turns clipping off")
    add("--eval_every", type=count, help="steps between reports (default: a twentieth of all)")
    add("--eval_batches", type=count, default=50, help="validation batches read for each report")
    help = "of the weights in model.pt"
    dtypes = ("float32", "bfloat16", "float16")
    add("--save_dtype", choices=dtypes, default="float32", help=help)


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
    start_from = args.pretrained_model_path if "pretrained_model_path" in args.given else None
    check_settings(args, start_from)
    device = pick_device(True) if args.use_gpu else best_device()
    llama = load_pretrained(start_from, causal=True) if start_from else None
    given = given_tokenizer(args, llama)
    settings = run_settings(args, start_from)
    measured = measure(args.text)
    folder = Path(args.output_dir)
    with open_run(folder, settings):
        tokenizer = prepare_tokenizer(args, given, folder, measured)
        texts = tokenize(args.text, args.split, measured, tokenizer, folder / "tokens")
        for name, text in texts.items():
            print(f"{name}: {text.n_bytes:,} bytes, {len(text):,} tokens")
            if text.n_unknown:
                print(f"  {text.n_unknown:,} of them <unk>, which bits per byte cannot account for")
        if llama is None:
            llama = Llama(LlamaConfig(vocab_size=tokenizer.n_words, causal=True, **shape(args)))
        if args.activation_checkpointing:
            checkpoint_activations(llama.layers)
        set_dropout(llama, args.dropout, args.attention_dropout)
        n_parameters = sum(parameter.numel() for parameter in llama.parameters())
        print(f"{n_parameters:,} parameters on {device}")
        run = Pretraining(args, llama.to(device), texts, folder, settings)
        try:
            run.train()
        except KeyboardInterrupt:
            print("interrupted; the same command continues from the last report", file=sys.stderr)
            raise
        if "test" in texts:
            run.test(texts["test"])


def check_settings(args: argparse.Namespace, start_from: str | None) -> None:
    """See that the flags describe a run.

    Raises:
        FileNotFoundError: a file is absent.
        InputError: a flag is wrong, or two do not go together.
    """
    if not args.text:
        raise InputError("--text: pre-training needs a text; name one or more files")
    tokenizer = [args.tokenizer_path] if start_from or "tokenizer_path" in args.given else []
    for path in [*args.text, *([start_from] if start_from else []), *tokenizer]:
        if not Path(path).is_file():
            raise missing_file(path)
    if args.causal is False:
        raise InputError("--no-causal: a language model learns with the causal mask; leave it out")
    check_dtype(args.dtype)
    if args.split[0] == 0:
        raise InputError("--split: the training part needs a share greater than 0")
    if tokenizer and "vocab_size" in args.given:
        raise InputError(f"--vocab_size: {tokenizer[0]} has a size of its own; leave it out")
    fixed = sorted(set(SHAPE) & set(args.given) - {"max_seq_len"})
    if start_from and fixed:
        flags = ", ".join(f"--{name}" for name in fixed)
        raise InputError(f"{flags}: {start_from} has a shape of its own; leave that out")
    try:
        dropout = {name: getattr(args, name) for name in ("dropout", "attention_dropout")}
        LlamaConfig(**dropout, **shape(args)).check()
    except ValueError as error:
        raise InputError(f"no such model: {error}") from error


def shape(args: argparse.Namespace) -> dict:
    """The arguments of `LlamaConfig` for a model from scratch, without the vocabulary."""
    return {name: getattr(args, name) for name in SHAPE} | {"max_seq_len": args.max_seq_len or 256}


def run_settings(args: argparse.Namespace, start_from: str | None) -> dict:
    """All that the result depends on, as JSON has it."""
    settings = {name: getattr(args, name) for name in [*RECIPE, *SHAPE, "vocab_size"]}
    files = list(args.text)
    if start_from:
        files.append(start_from)
    if start_from or "tokenizer_path" in args.given:
        files.append(args.tokenizer_path)
    return json.loads(json.dumps(settings | {"files": [fingerprint(file) for file in files]}))


def fingerprint(path: str | Path) -> str:
    """A file's name and the beginning of its SHA-256."""
    with Path(path).open("rb") as file:
        return f"{Path(path).name} {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


@contextlib.contextmanager
def open_run(folder: Path, settings: dict) -> Iterator[None]:
    """Hold the folder of a run, new or with an earlier part of the same run, against all others.

    As long as there is no model in it, a run may be begun again with other settings. What an error
    leaves behind before the training has begun is removed.

    Raises:
        InputError: it holds another run, or files of something else, or it is in use.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder; name another --output_dir")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is training there") from None
        _continue_or_clear(folder, settings)
        with atomic_write(folder / RUN) as file:
            json.dump(settings, file, indent=1)
        try:
            yield
        except InputError:
            if not (folder / STATE).exists():
                _clear(folder)
                if is_new:
                    folder.rmdir()
            raise
    finally:
        os.close(handle)


def _continue_or_clear(folder: Path, settings: dict) -> None:
    names = {path.name for path in folder.iterdir() if path.suffix != ".tmp"}
    if RUN not in names:
        if names:
            raise InputError(f"{folder}: holds other files; name an empty or a new --output_dir")
        before = {}
    else:
        try:
            before = json.loads((folder / RUN).read_bytes())
        except ValueError:
            before = None
        if not isinstance(before, dict) or before.keys() != settings.keys():
            raise InputError(f"{folder / RUN}: no settings of a run; name another --output_dir")
    changes = [
        f"{name} was {before.get(name)}, is {value}"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if MODEL in names and changes:
        raise InputError(
            f"{folder}: holds a run with other settings ({'; '.join(changes)}); "
            "give the same ones to continue it, or another --output_dir"
        )
    if (MODEL in names) > (STATE in names):
        raise InputError(
            f"{folder}: holds a model, but not the {STATE} to continue from; "
            "name another --output_dir"
        )
    for leftover in folder.rglob(".*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink()
    if changes:
        _clear(folder)


def _clear(folder: Path) -> None:
    for name in (RUN, STATE, METRICS, TOKENIZER_MODEL):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tokens", ignore_errors=True)


def given_tokenizer(args: argparse.Namespace, llama: Llama | None) -> Tokenizer | None:
    """The tokenizer that --tokenizer-path names or that belongs to the checkpoint."""
    if llama is None and "tokenizer_path" not in args.given:
        return None
    given = Tokenizer(tokenizer_model=args.tokenizer_path)
    vocab_size = given.n_words if llama is None else llama.vocab_size
    check_vocabulary(given, vocab_size, args.pretrained_model_path)
    return given


def prepare_tokenizer(
    args: argparse.Namespace, given: Tokenizer | None, folder: Path, measured: tuple[int, int]
) -> Tokenizer:
    """Put the tokenizer into the folder: the given one, or one trained on the text."""
    path = folder / TOKENIZER_MODEL

    def training_part() -> Iterator[str]:
        for part, text, _ in split_chunks(args.text, args.split, measured):
            if part == "train":
                yield text

    if given is not None:
        with atomic_write(path, "wb") as file:
            file.write(given.model_path.read_bytes())
    elif not path.is_file():
        train_tokenizer(training_part, args.vocab_size, path)
    return Tokenizer(tokenizer_model=path)


def set_dropout(llama: Llama, dropout: float, attention_dropout: float | None) -> None:
    config = llama.config
    config.dropout = dropout
    config.attention_dropout = dropout if attention_dropout is None else attention_dropout
    for module in llama.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout


class Pretraining:
    """The loop: model, optimizer and position in the text, saved whole at every report."""

    def __init__(
        self,
        args: argparse.Namespace,
        llama: Llama,
        texts: dict[str, TokenizedText],
        folder: Path,
        settings: dict,
    ):
        self.args, self.llama, self.texts, self.folder = args, llama, texts, folder
        self.settings = settings
        self.device = next(llama.parameters()).device
        self.seqlen = args.max_seq_len or llama.config.max_seq_len
        if self.seqlen > llama.config.max_seq_len:
            raise InputError(
                f"--max_seq_len {self.seqlen}: the context of {args.pretrained_model_path} is "
                f"{llama.config.max_seq_len}"
            )
        if len(texts["train"]) <= self.seqlen:
            raise InputError(
                f"a context of {self.seqlen} tokens is longer than the training part's "
                f"{len(texts['train'])}; lower --max_seq_len or give more text"
            )
        parameters = list(llama.parameters())
        self.optimizer = AdamW(
            [
                {
                    "params": [p for p in parameters if p.dim() >= 2],
                    "weight_decay": args.weight_decay,
                },
                {"params": [p for p in parameters if p.dim() < 2]},
            ],
            lr=args.lr,
            betas=(0.9, 0.99),  # a longer memory than 0.95, for the small batches of a CPU
        )
        self.step = 0
        self.best_loss = math.inf
        self.seconds = 0.0
        self._load()
        if self.step == 0:
            self._save()  # so that there is no model without a state to continue from

    def train(self) -> None:
        """Take the remaining steps."""
        args = self.args
        eval_every = args.eval_every or max(1, args.steps // 20)
        loss = self._loss()
        batches = self._batches(skip=self.step * args.grad_accum)
        self.llama.train()
        last_time = time.perf_counter()
        with tqdm(
            desc="train", total=args.steps, initial=self.step, leave=False, disable=None
        ) as progress:
            while self.step < args.steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(self.step, args)
                update(
                    self.llama,
                    list(itertools.islice(batches, args.grad_accum)),
                    loss,
                    self.optimizer,
                    f"step {self.step + 1}",
                    args.grad_clip or None,
                )
                self.step += 1
                progress.update()
                if self.step % eval_every == 0 or self.step == args.steps:
                    now = time.perf_counter()
                    self.seconds += now - last_time
                    self._report(loss, now - last_time)
                    self._save()
                    loss.reset()
                    last_time = time.perf_counter()

    def test(self, text: TokenizedText) -> None:
        """Evaluate the best weights on the whole of a text, and report it."""
        self.llama = load_pretrained(self.folder / MODEL).to(self.device)
        scores = self._evaluate(text, None)
        append_metrics(self.folder / METRICS, test=scores)
        print(f"test: {describe(scores)}")

    def _batches(self, skip: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows of the training part in random order, epoch after epoch, without the first batches.

        The order depends on seed and epoch only.
        """
        for epoch in itertools.count():
            generator = torch.Generator().manual_seed(self.args.seed + epoch)
            offset = int(torch.randint(self.seqlen, (), generator=generator))
            rows = TrainingRows(self.texts["train"], self.seqlen, offset)
            order = RandomSampler(rows, generator=generator)
            whole = len(rows) >= self.args.batch_size  # a smaller last batch would weigh too much
            batches = list(BatchSampler(order, self.args.batch_size, drop_last=whole))
            # Given a generator of its own, the loader leaves the global one to the dropout.
            yield from DataLoader(rows, batch_sampler=batches[skip:], generator=generator)
            skip = max(0, skip - len(batches))

    def _loss(self) -> "LanguageModelLoss":
        return LanguageModelLoss(self.device, self.args.dtype, self.texts["train"].bos_id)

    def _report(self, train_loss: "LanguageModelLoss", seconds: float) -> None:
        """Evaluate, tell how it goes, and keep the weights if they are the best so far."""
        record = {"step": self.step, "lr": learning_rate(self.step - 1, self.args)}
        record["train"] = train_loss.scores(self.texts["train"])
        if "validation" in self.texts:
            n_rows = self.args.eval_batches * self.args.batch_size
            record["validation"] = self._evaluate(self.texts["validation"], n_rows)
            if not math.isfinite(record["validation"]["loss"]):
                raise InputError(
                    f"the validation loss is not finite at step {self.step}; lower --lr"
                )
        if "validation" not in record or record["validation"]["loss"] < self.best_loss:
            self.best_loss = record.get("validation", record["train"])["loss"]
            self._save_model()
        record["seconds"] = self.seconds
        record["tokens_per_second"] = train_loss.n_targets / seconds
        append_metrics(self.folder / METRICS, **record)
        left = self.seconds / self.step * (self.args.steps - self.step)
        parts = [f"{name} {describe(record[name])}" for name in PARTS if name in record]
        tqdm.write(
            f"step {self.step}/{self.args.steps}: {' | '.join(parts)} | "
            f"{record['tokens_per_second']:,.0f} tokens/s, {tqdm.format_interval(left)} left"
        )
        sys.stdout.flush()

    def _evaluate(self, text: TokenizedText, n_rows: int | None) -> dict[str, float]:
        self.llama.eval()
        loss = self._loss()
        rows = EvaluationRows(text, self.seqlen, n_rows)
        loader = DataLoader(rows, self.args.batch_size, generator=torch.Generator())
        with torch.inference_mode():
            for batch in tqdm(loader, desc="evaluate", leave=False, disable=None):
                loss(batch, self.llama)
        self.llama.train()
        return loss.scores(text)

    def _save_model(self) -> None:
        """Write the weights in the layout of `stories42M.pt`."""
        dtype = getattr(torch, self.args.save_dtype)
        weights = {name: t.detach().to("cpu", dtype) for name, t in self.llama.state_dict().items()}
        weights["tok_embeddings.weight"] = weights["output.weight"]  # stored once
        config = self.llama.config
        names = [*SHAPE, "vocab_size", "layer_norm_eps", "causal"]
        saved = {
            "model": weights,
            "model_args": {name: getattr(config, name) for name in names},
            "iter_num": self.step,
            "best_val_loss": torch.tensor(self.best_loss),
            "config": self.settings,
        }
        write_checkpoint(saved, self.folder / MODEL)

    def _save(self) -> None:
        saved = {
            "model": self.llama.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best_loss": self.best_loss,
            "seconds": self.seconds,
            "settings": self.settings,
            "torch_rng": torch.get_rng_state(),
        }
        if self.device.type != "cpu":
            saved["device_rng"] = torch.get_device_module(self.device).get_rng_state()
        write_checkpoint(saved, self.folder / STATE)

    def _load(self) -> None:
        """Go back to the last report, if there was one."""
        if (self.folder / STATE).is_file():
            saved = read_checkpoint(self.folder / STATE)
            if saved.get("settings") != self.settings:
                raise InputError(
                    f"{self.folder / STATE}: not this run's; name another --output_dir"
                )
            if saved["step"] > 0 and not (self.folder / MODEL).is_file():
                raise InputError(f"{self.folder}: its {MODEL} is gone; name another --output_dir")
            self.llama.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.best_loss = saved["step"], saved["best_loss"]
            self.seconds = saved["seconds"]
            torch.set_rng_state(saved["torch_rng"])
            if "device_rng" in saved and self.device.type != "cpu":
                torch.get_device_module(self.device).set_rng_state(saved["device_rng"])
            print(f"continuing from step {self.step} in {self.folder}")
        # What was reported after that is going to be reported again.
        path = self.folder / METRICS
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
        with atomic_write(path) as file:
            for line in lines:
                with contextlib.suppress(
                    ValueError, TypeError, KeyError
                ):  # a line that was cut off
                    if json.loads(line)["step"] <= self.step:
                        file.write(f"{line}\n")


class LanguageModelLoss:
    """The mean cross-entropy of the next tokens, which it also adds up for the reports.

    A batch is `(tokens, targets)`, each `(batch, seqlen)`. The end of a document, where BOS comes
    next, is learned too, but is not part of the reports.
    """

    def __init__(self, device: torch.device, dtype: str, bos_id: int):
        self.device, self.dtype, self.bos_id = device, dtype, bos_id
        self.reset()

    def reset(self) -> None:
        self.n_targets = self.n_correct = 0
        self.nats = 0.0

    def __call__(self, batch: tuple[torch.Tensor, torch.Tensor], model: Llama) -> torch.Tensor:
        tokens, targets = (part.to(self.device) for part in batch)
        with mixed_precision(self.device, self.dtype):
            logits = model.output(model.hidden_states(tokens)).flatten(0, 1)
        targets = targets.flatten()
        losses = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
        counted = (targets != IGNORED) & (targets != self.bos_id)
        self.n_targets += counted.sum().item()
        self.n_correct += (logits.detach().argmax(dim=-1) == targets)[counted].sum().item()
        self.nats += losses.detach()[counted].sum().item()
        return losses.sum() / (targets != IGNORED).sum()

    def scores(self, text: TokenizedText) -> dict[str, float]:
        """Loss per token (nats), accuracy, perplexity, and bits per byte of a text.

        Bits per byte do not depend on the tokenizer, unless it has unknown characters: a run of
        them is a single token, and what they were is not predicted.
        """
        loss = self.nats / self.n_targets
        tokens_per_byte = (len(text) - len(text.starts)) / text.n_bytes
        return {
            "loss": loss,
            "accuracy": self.n_correct / self.n_targets,
            "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": loss / math.log(2) * tokens_per_byte,
        }


def describe(scores: dict[str, float]) -> str:
    return (
        f"loss {scores['loss']:.3f}, acc {scores['accuracy']:.3f}, "
        f"ppl {scores['perplexity']:.2f}, {scores['bits_per_byte']:.3f} bits per byte"
    )


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up to `args.lr`, then cosine decay to `args.min_lr` (arXiv 1608.03983, eq. 5).

    Args:
        step: the number of steps taken before.
    """
    warmup = min(100, args.steps // 10) if args.warmup_steps is None else args.warmup_steps
    fraction = warmup_decay(step, args.steps, warmup)
    lowest = args.min_lr if step >= warmup else 0.0
    return lowest + (args.lr - lowest) * fraction
