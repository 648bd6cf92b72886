"""Sequences of token ids that a language model learns from and is evaluated on."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from minllama.common.errors import InputError
from minllama.text.token_files import TokenizedText

IGNORED = -100  # a target that does not count, the default of F.cross_entropy


class Pieces:
    """Documents cut every `step` ids, except for their last `n_left_out`.

    Where a piece begins is computed on demand: memory is needed for each document, not each piece.
    """

    def __init__(self, text: TokenizedText, step: int, n_left_out: int):
        self.bounds, self.step = np.append(text.starts, len(text)), step
        lengths = np.maximum(np.diff(self.bounds) - n_left_out, 0)
        n_pieces = (lengths + step - 1) // step
        self.ends = np.cumsum(n_pieces)  # number of pieces up to the end of each document

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> tuple[int, int]:
        """Return the start of piece `i` and the end of its document."""
        document = int(self.ends.searchsorted(i, side="right"))
        n_before = int(self.ends[document - 1]) if document else 0
        start = int(self.bounds[document]) + self.step * (i - n_before)
        return start, int(self.bounds[document + 1])


class TrainingSequences(Dataset):
    """Sequences of `seqlen` ids with their targets, the next ids, of a text of more than `seqlen`.

    A sequence begins where a document does, or `offset` ids into it and every `seqlen` ids from
    there. Another offset thus gives other sequences of the same text. A sequence continues into the
    next documents, so short documents are in several sequences.
    """

    def __init__(self, text: TokenizedText, seqlen: int, offset: int):
        self.text, self.seqlen, self.offset = text, seqlen, offset
        self.inner = Pieces(text, seqlen, n_left_out=offset)
        self.n_first = len(text.starts) if offset else 0  # sequences that begin with a document

    def __len__(self) -> int:
        return self.n_first + len(self.inner)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets, each `(seqlen,)`."""
        if i < self.n_first:
            start = int(self.text.starts[i])
        else:
            start = self.inner[i - self.n_first][0] + self.offset
        start = min(start, len(self.text) - self.seqlen - 1)
        ids = torch.from_numpy(self.text[start : start + self.seqlen + 1].astype(np.int64))
        return ids[:-1], ids[1:]


class EvaluationSequences(Dataset):
    """Sequences that predict every id of the documents exactly once, except BOS.

    A document is cut every `seqlen` ids. Padding is BOS, with targets `IGNORED`.

    Args:
        n_sequences: take this many, evenly spaced over the text; None takes all.
    """

    def __init__(self, text: TokenizedText, seqlen: int, n_sequences: int | None = None):
        self.text, self.seqlen = text, seqlen
        self.pieces = Pieces(text, seqlen, n_left_out=1)  # a document's last id is only a target
        self.chosen: range | np.ndarray = range(len(self.pieces))
        if n_sequences is not None and n_sequences < len(self.pieces):
            self.chosen = np.linspace(0, len(self.pieces) - 1, n_sequences).astype(np.int64)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets, each `(seqlen,)`."""
        start, end = self.pieces[int(self.chosen[i])]
        end = min(end, start + self.seqlen + 1)  # the last target included
        ids = torch.from_numpy(self.text[start:end].astype(np.int64))
        tokens = ids.new_full((self.seqlen,), self.text.tokenizer.bos_id)
        targets = ids.new_full((self.seqlen,), IGNORED)
        tokens[: len(ids) - 1], targets[: len(ids) - 1] = ids[:-1], ids[1:]
        return tokens, targets


def training_batches(
    text: TokenizedText, seqlen: int, batch_size: int, seed: int, skip: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of tokens and targets in random order, epoch after epoch, without end.

    The order depends on seed and epoch only; the first `skip` batches are left out. So are
    sequences that do not fill a batch, which would weigh too much, unless the text has no more.

    Yields:
        tokens and targets, each `(batch, seqlen)`.
    """
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(seed + epoch)
        offset = int(torch.randint(seqlen, (), generator=generator))
        sequences = TrainingSequences(text, seqlen, offset)
        n_batches = max(1, len(sequences) // batch_size)
        if skip >= n_batches:
            skip -= n_batches
            continue
        order = torch.randperm(len(sequences), generator=generator)
        indices = order[skip * batch_size : n_batches * batch_size]
        # With a generator of its own, the loader draws nothing from the global one.
        sampler = BatchSampler(indices.numpy(), batch_size, drop_last=False)
        yield from DataLoader(sequences, batch_sampler=sampler, generator=generator)
        skip = 0


def check_lengths(seqlen: int, grad_accum: int, context: int, n_tokens: int) -> None:
    """Check that a model's context and a training split are long enough for `seqlen`."""
    if seqlen > context:
        raise InputError(f"--max_seq_len {seqlen}: the context of the checkpoint is {context}")
    if n_tokens <= seqlen or grad_accum > n_tokens // seqlen:
        raise InputError(
            f"--grad_accum {grad_accum}: the training split's {n_tokens} tokens do not fill so "
            f"many sequences of {seqlen}; lower it or --max_seq_len, or give more text"
        )
