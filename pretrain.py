"""`--option pretrain`: train a language model on plain text, from nothing or from a checkpoint."""

import argparse
import contextlib
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
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
    split_chunks,
    tokenize,
    train_tokenizer,
)
from llama import Llama, load_pretrained
from optimizer import AdamW
from tokenizer import TOKENIZER_MODEL, Tokenizer, check_vocabulary
from training import update
from utils import InputError, atomic_write, best_device, missing_file, pick_device

SHAPE = ["dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "multiple_of", "max_seq_len"]
SHARED_DEFAULTS = {"batch_size": 16, "lr": 1e-3}  # of flags that other options have too
MODEL, STATE, METRICS, RUN = "model.pt", "state.pt", "metrics.jsonl", "settings.json"


def add_arguments(parser: argparse.ArgumentParser, number: Callable) -> None:
    """Declare the flags that only pre-training has.

    Args:
        number: makes an argparse type of a kind and its bounds.
    """
    group = parser.add_argument_group(
        "pre-training",
        "Trains a causal language model on --text; from --pretrained-model-path where that is "
        "given, else from nothing. --batch_size is 16 and --lr 1e-3 by default.",
    )

    def add(flag: str, help: str, **settings: Any) -> None:
        if settings.get("default") is not None:
            help += " (default: %(default)s)"
        group.add_argument(flag, help=help, **settings)

    count, share = number(int, 1), number(float, 0, 1)
    add(
        "--text",
        "plain text, with <|endoftext|> lines between documents, or labelled sentences",
        nargs="+",
        metavar="FILE",
    )
    add(
        "--output_dir",
        "folder for model.pt, tokenizer.model and metrics.jsonl; if it holds a run that was "
        "interrupted, that goes on",
        default="pretrained",
        metavar="DIR",
    )
    add(
        "--split",
        "shares of the text",
        nargs=3,
        type=share,
        default=(0.7, 0.15, 0.15),
        metavar=("TRAIN", "VALIDATION", "TEST"),
    )
    add(
        "--vocab_size",
        "pieces of the tokenizer that is trained, if no --tokenizer-path is given",
        type=count,
        default=2048,
    )
    add("--dim", "width of the residual stream", type=count, default=256)
    add("--n_layers", "number of layers", type=count, default=6)
    add("--n_heads", "number of query heads", type=count, default=4)
    add("--n_kv_heads", "number of key and value heads (default: as --n_heads)", type=count)
    add("--hidden_dim", "width of the feed-forward layers (default: 8/3 of --dim)", type=count)
    add("--multiple_of", "the default --hidden_dim is rounded up to it", type=count, default=32)
    add(
        "--max_seq_len",
        "context in tokens; with a checkpoint, the length of the rows",
        type=count,
        default=256,
    )
    add("--dropout", "of embeddings and sub-layers", type=share, default=0.0)
    add("--attention_dropout", "of attention weights (default: as --dropout)", type=share)
    add("--steps", "steps of the optimizer", type=count, default=1000)
    add("--grad_accum", "batches per step", type=count, default=1)
    add(
        "--warmup_steps",
        "steps to reach --lr in (default: a tenth of the steps, 100 at most)",
        type=number(int, 0),
    )
    rate = number(float, 0)
    add(
        "--min_lr",
        "where the cosine decay of --lr ends; the same as --lr keeps it constant",
        type=rate,
        default=0.0,
    )
    add("--weight_decay", "of the matrices", type=rate, default=0.1)
    add("--grad_clip", "longest gradient; 0 does not clip", type=rate, default=1.0)
    add("--eval_every", "steps between reports (default: a twentieth of all)", type=count)
    add(
        "--eval_batches",
        "of validation, read for a report; test is read whole",
        type=count,
        default=50,
    )
    add(
        "--save_dtype",
        "of the weights in model.pt",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
    )


def pretrain(args: argparse.Namespace) -> None:
    """Train on `args.text`; leave the best weights, the tokenizer and all reports in a folder.

    The folder's `model.pt` has the layout of `stories42M.pt`, with `causal: True`, and its
    `tokenizer.model` stands beside it, so that every other option takes it. A run that was
    interrupted, however it was, goes on from its last report when it is started again, to the
    same weights as without the interruption.

    Raises:
        InputError: a setting or the text does not allow it; or the loss is not finite, in which
            case the weights of the last report stay.
    """
    start_from = args.pretrained_model_path if "pretrained_model_path" in args.given else None
    check_settings(args, start_from)
    device = pick_device(True) if args.use_gpu else best_device()
    folder = Path(args.output_dir)
    open_run(folder, run_settings(args, start_from))

    llama = load_pretrained(start_from, causal=True) if start_from else None
    tokenizer = prepare_tokenizer(args, llama, folder)
    texts = tokenize(args.text, args.split, tokenizer, folder / "tokens")
    for name, text in texts.items():
        unknown = f", {text.n_unknown:,} of them unknown" if text.n_unknown else ""
        print(f"{name}: {text.n_bytes:,} bytes, {len(text):,} tokens{unknown}")
    if llama is None:
        shape = {name: getattr(args, name) for name in SHAPE}
        llama = Llama(LlamaConfig(vocab_size=tokenizer.n_words, causal=True, **shape))
    set_dropout(llama, args.dropout, args.attention_dropout)
    n_parameters = sum(parameter.numel() for parameter in llama.parameters())
    print(f"{n_parameters:,} parameters on {device}")

    run = Pretraining(args, llama.to(device), texts, folder)
    try:
        run.train()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last report", file=sys.stderr)
        raise
    if "test" in texts:
        run.test(texts["test"])


def check_settings(args: argparse.Namespace, start_from: str | None) -> None:
    """See that the flags describe a run.

    Raises:
        InputError: they do not.
    """
    if not args.text:
        raise InputError("--text: pre-training needs a text; name one or more files")
    for path in args.text:
        if not Path(path).is_file():
            raise missing_file(path)
    if args.causal is False:
        raise InputError("--no-causal: a language model learns with the causal mask; leave it out")
    if args.dtype == "int8":
        raise InputError("--dtype int8: training is in float32 or bfloat16")
    if args.split[0] == 0:
        raise InputError("--split: the training part needs a share greater than 0")
    shape = {name: getattr(args, name) for name in SHAPE}
    try:
        LlamaConfig(dropout=args.dropout, attention_dropout=args.attention_dropout, **shape).check()
    except ValueError as error:
        raise InputError(f"no such model: {error}") from error
    fixed = sorted({"vocab_size", *SHAPE} & set(args.given) - {"max_seq_len"})
    if start_from is not None and fixed:
        flags = ", ".join(f"--{name}" for name in fixed)
        raise InputError(f"{flags}: {start_from} has a shape of its own; leave that out")


def run_settings(args: argparse.Namespace, start_from: str | None) -> dict:
    """All that the result depends on, as JSON has it."""
    names = ["seed", "batch_size", "lr", "dtype", "dropout", "attention_dropout", "split", "steps"]
    names += ["grad_accum", "warmup_steps", "min_lr", "weight_decay", "grad_clip", "eval_every"]
    names += ["eval_batches", "save_dtype", "max_seq_len"]
    files = list(args.text)
    if start_from is not None:
        files.append(start_from)
    else:
        names += SHAPE
    if start_from is not None or "tokenizer_path" in args.given:
        files.append(args.tokenizer_path)
    else:
        names.append("vocab_size")
    settings = {name: getattr(args, name) for name in names}
    settings["files"] = [f"{Path(f).name}, {Path(f).stat().st_size} bytes" for f in files]
    return json.loads(json.dumps(settings))


def open_run(folder: Path, settings: dict) -> None:
    """Make the folder of a run, or see that it holds an earlier part of the same run.

    Raises:
        InputError: it holds another run, or files of something else.
    """
    run_file = folder / RUN
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder; name another --output_dir")
    if run_file.is_file():
        before = json.loads(run_file.read_text())
        changes = [
            f"{name} was {before.get(name)}, is {settings.get(name)}"
            for name in {**before, **settings}
            if before.get(name) != settings.get(name)
        ]
        if not changes:
            return
        if (folder / STATE).is_file():
            raise InputError(
                f"{folder}: holds a run with other settings ({'; '.join(changes)}); "
                "give the same ones to go on with it, or another --output_dir"
            )
        (folder / TOKENIZER_MODEL).unlink(missing_ok=True)
        shutil.rmtree(folder / "tokens", ignore_errors=True)
    elif folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: holds other files; name an empty or a new --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(run_file) as file:
        json.dump(settings, file, indent=1)


def prepare_tokenizer(args: argparse.Namespace, llama: Llama | None, folder: Path) -> Tokenizer:
    """Put the tokenizer into the folder: the model's, the given one, or one trained on the text."""
    path = folder / TOKENIZER_MODEL
    if not path.is_file():
        if llama is not None or "tokenizer_path" in args.given:
            given = Tokenizer(tokenizer_model=args.tokenizer_path)
            if llama is not None:
                check_vocabulary(given, llama.vocab_size, args.pretrained_model_path)
            elif "vocab_size" in args.given:
                check_vocabulary(given, args.vocab_size, "--vocab_size")
            with atomic_write(path, "wb") as file:
                file.write(given.model_path.read_bytes())
        else:
            train_tokenizer(
                lambda: (text for part, text, _ in split_chunks(args.text, args.split) if not part),
                args.vocab_size,
                path,
            )
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
        self, args: argparse.Namespace, llama: Llama, texts: dict[str, TokenizedText], folder: Path
    ):
        self.args, self.llama, self.texts, self.folder = args, llama, texts, folder
        self.device = next(llama.parameters()).device
        self.seqlen = llama.config.max_seq_len
        if "max_seq_len" in args.given:
            self.seqlen = min(self.seqlen, args.max_seq_len)
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
            betas=(0.9, 0.99),
        )
        self.step = 0
        self.best_loss = math.inf
        self.seconds = 0.0
        self._load()

    def train(self) -> None:
        """Take the remaining steps."""
        args = self.args
        eval_every = args.eval_every or max(1, args.steps // 20)
        loss = LanguageModelLoss(self.device, args.dtype)
        TrainingRows(self.texts["train"], self.seqlen, offset=0)  # sees that there are any
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
        self._append({"test": scores})
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
            batches = list(BatchSampler(order, self.args.batch_size, drop_last=False))
            # Given a generator of its own, the loader leaves the global one to the dropout.
            yield from DataLoader(rows, batch_sampler=batches[skip:], generator=generator)
            skip = max(0, skip - len(batches))

    def _report(self, train_loss: "LanguageModelLoss", seconds: float) -> None:
        """Evaluate, tell how it goes, and keep the weights if they are the best so far."""
        record = {"step": self.step, "lr": learning_rate(self.step - 1, self.args)}
        record["train"] = train_loss.scores(self.texts["train"])
        if "validation" in self.texts:
            n_rows = self.args.eval_batches * self.args.batch_size
            record["validation"] = self._evaluate(self.texts["validation"], n_rows)
        if "validation" not in record or record["validation"]["loss"] < self.best_loss:
            self.best_loss = record.get("validation", record["train"])["loss"]
            self._save_model()
        record["seconds"] = self.seconds
        record["tokens_per_second"] = train_loss.n_targets / seconds
        self._append(record)
        left = self.seconds / self.step * (self.args.steps - self.step)
        parts = [f"{name} {describe(record[name])}" for name in PARTS if name in record]
        tqdm.write(
            f"step {self.step}/{self.args.steps}: {' | '.join(parts)} | "
            f"{record['tokens_per_second']:,.0f} tokens/s, {tqdm.format_interval(left)} left"
        )
        sys.stdout.flush()

    def _evaluate(self, text: TokenizedText, n_rows: int | None) -> dict[str, float]:
        self.llama.eval()
        loss = LanguageModelLoss(self.device, self.args.dtype)
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
            "config": json.loads((self.folder / RUN).read_text()),
        }
        write_checkpoint(saved, self.folder / MODEL)

    def _save(self) -> None:
        saved = {
            "model": self.llama.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best_loss": self.best_loss,
            "seconds": self.seconds,
            "torch_rng": torch.get_rng_state(),
        }
        if self.device.type != "cpu":
            saved["device_rng"] = torch.get_device_module(self.device).get_rng_state()
        write_checkpoint(saved, self.folder / STATE)

    def _load(self) -> None:
        """Go back to the last report, if there was one."""
        if (self.folder / STATE).is_file():
            saved = read_checkpoint(self.folder / STATE)
            self.llama.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.best_loss = saved["step"], saved["best_loss"]
            self.seconds = saved["seconds"]
            torch.set_rng_state(saved["torch_rng"])
            if "device_rng" in saved and self.device.type != "cpu":
                torch.get_device_module(self.device).set_rng_state(saved["device_rng"])
            print(f"going on from step {self.step} in {self.folder}")
        # What was reported after that is going to be reported again.
        path = self.folder / METRICS
        lines = path.read_text().splitlines() if path.is_file() else []
        with atomic_write(path) as file:
            for line in lines:
                with contextlib.suppress(ValueError):  # a line that was cut off
                    if json.loads(line).get("step", math.inf) <= self.step:
                        file.write(f"{line}\n")

    def _append(self, record: dict) -> None:
        with (self.folder / METRICS).open("a") as file:
            file.write(f"{json.dumps(record)}\n")


class LanguageModelLoss:
    """The mean cross-entropy of the next tokens, which it also adds up for the reports.

    A batch is `(tokens, targets)`, each `(batch, seqlen)`.
    """

    def __init__(self, device: torch.device, dtype: str):
        self.device, self.dtype = device, dtype
        self.reset()

    def reset(self) -> None:
        self.n_targets = self.n_correct = 0
        self.nats = 0.0

    def __call__(self, batch: tuple[torch.Tensor, torch.Tensor], model: Llama) -> torch.Tensor:
        tokens, targets = (part.to(self.device) for part in batch)
        with mixed_precision(self.device, self.dtype, tokens.shape[1]):
            logits = model.output(model.hidden_states(tokens))
        logits, targets = logits.flatten(0, 1), targets.flatten()
        value = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED)
        n_targets = (targets != IGNORED).sum().item()
        self.n_targets += n_targets
        self.n_correct += (logits.detach().argmax(dim=-1) == targets).sum().item()
        self.nats += value.item() * n_targets
        return value

    def scores(self, text: TokenizedText) -> dict[str, float]:
        """Loss per token (nats), accuracy, perplexity, and bits per byte of a text."""
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


@contextlib.contextmanager
def mixed_precision(device: torch.device, dtype: str, seqlen: int) -> Iterator[None]:
    """Autocast to bfloat16, if that is the dtype; weights, norms and softmax stay in float32.

    On a CPU, short rows then are attended to by PyTorch's plain products in bfloat16: its flash
    kernel takes twice as long there, backward included.
    """
    if dtype != "bfloat16":
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if device.type == "cpu" and seqlen <= 512:
            allow = torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp
            stack.callback(allow, torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed())
            allow(True)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up to `args.lr`, then cosine decay to `args.min_lr` (arXiv 1608.03983, eq. 5).

    Args:
        step: the number of steps taken before.
    """
    warmup = min(100, args.steps // 10) if args.warmup_steps is None else args.warmup_steps
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, args.steps - warmup)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2
