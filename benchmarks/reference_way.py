"""Fine-tuning and prompting as the assignment's reference works, to measure against.

    .venv/bin/python -m benchmarks.reference_way --option finetune \\
        --pretrained-model-path random42M.pt --train data/sst-train.txt --dev data/sst-dev.txt \\
        --test data/sst-test.txt --label-names data/sst-label-mapping.json

One epoch over shuffled batches without a mask, in float32. Sentences are tokenized at every use,
rotary tables are rebuilt in every layer, the states of all positions are computed, the optimizer is
a Python loop over the parameters, and fine-tuning evaluates with autograd on. Results are those of
`run_llama.py` with the same flags, and so are the records in `metrics.jsonl`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import rope
from llama import Attention, load_pretrained
from minllama.common.program import positive, run_script, script_parser
from minllama.text.batches import Example
from minllama.text.labelled import LlamaDataset, create_data, load_label_names
from minllama.text.prompts import TEMPLATE, fill_template
from optimizer import AdamW
from tokenizer import Tokenizer
from utils import peak_memory, seed_everything


class ReferenceClassifier(nn.Module):
    """A Llama that is read at the last position of the padded batch.

    Args:
        name_ids: ids of the labels' names, which are scored there; None is for a new head.
    """

    def __init__(self, path: str, num_labels: int, name_ids: list[list[int]] | None):
        super().__init__()
        self.llama = load_pretrained(path, causal=False)
        self.name_ids = name_ids
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(self.llama.config.dim, num_labels)
        for module in self.llama.modules():
            if isinstance(module, Attention):
                module.register_forward_pre_hook(rebuild_rotary_table)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Ids `(batch, seqlen)` to scores of the labels `(batch, num_labels)`."""
        logits, hidden = self.llama(token_ids)
        if self.name_ids is None:
            return F.log_softmax(self.head(self.dropout(hidden[:, -1])), dim=-1)
        log_probs = F.log_softmax(logits[:, -1], dim=-1)
        return torch.stack([log_probs[:, ids].sum(dim=-1) for ids in self.name_ids], dim=-1)


def rebuild_rotary_table(*_: object) -> None:
    rope.rotary_table.cache_clear()


def make_loader(path: str, args: argparse.Namespace, suffix: str | None) -> DataLoader:
    """Batches of the assignment's data set; `suffix` is the prompt after each sentence."""
    tokenizer = Tokenizer(args.max_sentence_len, args.tokenizer_path)
    data = create_data(path, tokenizer, flag="test", eos=False, prompt_suffix=suffix)
    sentences = LlamaDataset(cast("list[Example]", data), args)
    is_train = path == args.train
    return DataLoader(sentences, args.batch_size, is_train, collate_fn=sentences.collate_fn)


def train(model: nn.Module, loader: DataLoader, args: argparse.Namespace) -> dict[str, float]:
    """Train for one epoch."""
    optimizer = AdamW(model.parameters(), lr=args.lr)
    losses, n, start = [], 0, time.perf_counter()
    model.train()
    for batch in loader:
        optimizer.zero_grad()
        log_probs = model(batch["token_ids"])
        loss = F.nll_loss(log_probs, batch["labels"], reduction="sum") / args.batch_size
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        n += len(batch["labels"])
    rate = n / (time.perf_counter() - start)
    return {"train_loss": sum(losses) / len(losses), "train_sentences_per_second": rate}


def evaluate(model: nn.Module, loader: DataLoader) -> dict[str, float]:
    n_correct, n, start = 0, 0, time.perf_counter()
    model.eval()
    for batch in loader:
        predictions = model(batch["token_ids"]).argmax(dim=-1)
        n_correct += int((predictions == batch["labels"]).sum())
        n += len(batch["labels"])
    rate = n / (time.perf_counter() - start)
    return {"accuracy": n_correct / n, "sentences_per_second": rate}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--option", choices=("finetune", "prompt"), default="finetune")
    for name in ("pretrained-model-path", "train", "dev", "test", "label-names"):
        parser.add_argument(f"--{name}", required=True, metavar="FILE")
    parser.add_argument("--tokenizer-path", default="tokenizer.model")
    parser.add_argument("--batch_size", type=positive, default=8)
    parser.add_argument("--lr", type=float, default=2e-5)
    args = parser.parse_args()
    seed_everything(1337)
    names, is_prompt = load_label_names(args.label_names), args.option == "prompt"
    tokenizer = Tokenizer(tokenizer_model=args.tokenizer_path)
    name_ids = [tokenizer.encode(name, bos=False, eos=False) for name in names]
    model = ReferenceClassifier(
        args.pretrained_model_path, len(names), name_ids if is_prompt else None
    )
    args.max_sentence_len = model.llama.config.max_seq_len - 1  # and BOS
    suffix = fill_template(TEMPLATE, names)[1].removeprefix(" ") if is_prompt else None
    train_loader, *loaders = (
        make_loader(path, args, suffix) for path in (args.train, args.dev, args.test)
    )
    records = [] if is_prompt else [train(model, train_loader, args)]
    with torch.set_grad_enabled(not is_prompt):
        records += [evaluate(model, loader) for loader in loaders]
    with Path("metrics.jsonl").open("a", encoding="utf-8") as file:
        peak = {"peak_memory_bytes": peak_memory(torch.device("cpu"))}
        for record in records:
            file.write(f"{json.dumps(record | peak)}\n")


if __name__ == "__main__":
    run_script(main)
