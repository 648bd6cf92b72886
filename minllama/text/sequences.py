"""Sequences of token ids that a language model learns from and is evaluated on."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from minllama.common.errors import InputError
from minllama.text.tokenized import TokenizedText

IGNORED = -100  # a target that does not count, the default of F.cross_entropy


class Pieces:
    """Documents cut every `step` ids.

    Where a piece begins is computed on demand: memory is needed for each document, not each piece.

    Args:
        n_left_out: ids of each document that are not in pieces.
    """

    def __init__(self, text: TokenizedText, step: int, n_left_out: int):
        self.starts, self.step = text.starts, step
        lengths = np.maximum(np.diff(text.starts, append=len(text)) - n_left_out, 0)
        n_pieces = (lengths + step - 1) // step
        self.ends = np.cumsum(n_pieces)  # number of pieces up to the end of each document

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> tuple[int, int]:
        """Where piece `i` begins, and the index of its document."""
        document = int(self.ends.searchsorted(i, side="right"))
        n_before = int(self.ends[document - 1]) if document else 0
        return int(self.starts[document]) + self.step * (i - n_before), document


class TrainingSequences(Dataset):
    """Sequences of `seqlen` ids with their targets, the next ids.

    A sequence begins where a document does, or `offset` ids into it and every `seqlen` ids from
    there. Another offset thus gives other sequences of the same text. A sequence continues into the
    next documents, so short documents are in several sequences.

    Args:
        text: more than `seqlen` ids.
    """

    def __init__(self, text: TokenizedText, seqlen: int, offset: int):
        self.text, self.seqlen, self.offset = text, seqlen, offset
        self.inner = Pieces(text, seqlen, n_left_out=offset)
        self.n_first = len(text.starts) if offset else 0  # sequences that begin with a document

    def __len__(self) -> int:
        return self.n_first + len(self.inner)

    def start_of(self, i: int) -> int:
        """Where in the text sequence `i` begins."""
        if i < self.n_first:
            start = int(self.text.starts[i])
        else:
            start = self.inner[i - self.n_first][0] + self.offset
        return min(start, len(self.text) - self.seqlen - 1)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets, each `(seqlen,)`."""
        start = self.start_of(i)
        ids = torch.from_numpy(self.text.ids[start : start + self.seqlen + 1].astype(np.int64))
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
        self.chosen: np.ndarray | None = None
        if n_sequences is not None and n_sequences < len(self.pieces):
            self.chosen = np.linspace(0, len(self.pieces) - 1, n_sequences).astype(np.int64)

    def __len__(self) -> int:
        return len(self.pieces) if self.chosen is None else len(self.chosen)

    def bounds_of(self, i: int) -> tuple[int, int]:
        """Where in the text sequence `i` begins, and where it ends, its last target included."""
        start, document = self.pieces[i if self.chosen is None else int(self.chosen[i])]
        is_last = document + 1 == len(self.text.starts)
        end = len(self.text) if is_last else int(self.text.starts[document + 1])
        return start, min(start + self.seqlen + 1, end)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets, each `(seqlen,)`."""
        start, end = self.bounds_of(i)
        ids = torch.from_numpy(self.text.ids[start:end].astype(np.int64))
        tokens = ids.new_full((self.seqlen,), self.text.bos_id)
        targets = ids.new_full((self.seqlen,), IGNORED)
        tokens[: len(ids) - 1], targets[: len(ids) - 1] = ids[:-1], ids[1:]
        return tokens, targets


def training_batches(
    text: TokenizedText, seqlen: int, batch_size: int, seed: int, skip: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of tokens and targets in random order, epoch after epoch, without end.

    The order depends on seed and epoch only. Sequences that do not fill a batch are left out,
    because a smaller batch would weigh too much, unless the text has no more.

    Args:
        skip: number of batches to leave out at the start.

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
    """Check that a text can be cut into training sequences.

    Args:
        context: the longest sequence that the model takes.
        n_tokens: size of the training split.

    Raises:
        InputError: the context or the text is too short.
    """
    if seqlen > context:
        raise InputError(f"--max_seq_len {seqlen}: the context of the checkpoint is {context}")
    if n_tokens <= seqlen:
        raise InputError(
            f"a context of {seqlen} tokens is longer than the training split's {n_tokens}; lower "
            "--max_seq_len or give more text"
        )
    if grad_accum > n_tokens // seqlen:
        raise InputError(
            f"--grad_accum {grad_accum}: a step would be more batches than the training split has "
            f"sequences of {seqlen} tokens; lower it or give more text"
        )
