"""Two sentence classifiers over a Llama: by prompting, and with a trained head."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llama import Llama, load_pretrained
from minllama.common.errors import InputError
from minllama.inference.cache import KVCache
from tokenizer import Tokenizer, check_vocabulary


def load_backbone(config: Any) -> Llama:
    """Load the Llama of a classifier, in float32.

    Args:
        config: any object with `pretrained_model_path`, and optionally `causal` and `init_weights`,
            the arguments of `load_pretrained`.
    """
    return load_pretrained(
        config.pretrained_model_path,
        causal=getattr(config, "causal", None),
        init_weights=getattr(config, "init_weights", True),
    )


class LlamaZeroShotClassifier(nn.Module):
    """Chooses the label whose name continues a prompt best. Nothing is trained.

    Args:
        config: any object with `num_labels` and what `load_backbone` takes.
        tokenizer: encodes the label names.
        label_names: one name per label.
    """

    def __init__(self, config: Any, tokenizer: Tokenizer, label_names: Sequence[str]):
        super().__init__()
        if len(label_names) != config.num_labels:
            raise InputError(f"{len(label_names)} label names for {config.num_labels} labels")
        self.num_labels = config.num_labels
        self.llama = load_backbone(config)
        self.llama.requires_grad_(False)
        check_vocabulary(tokenizer, self.llama.config, config.pretrained_model_path)
        self.tokenizer = tokenizer
        self.label_names = list(label_names)
        self.label_name_ids = [
            tokenizer.encode(name, bos=False, eos=False, truncate=False) for name in label_names
        ]

    @property
    def reads_lengths(self) -> bool:
        """Whether `forward` takes the length of each prompt."""
        return self.llama.config.causal

    @property
    def uses_cache(self) -> bool:
        """Whether labels of several tokens continue the prompt."""
        return self.llama.config.causal and max(map(len, self.label_name_ids)) > 1

    @property
    def max_prompt_len(self) -> int:
        """The context in tokens, less those that the longest label takes in a causal model."""
        config = self.llama.config
        longest = max(len(ids) for ids in self.label_name_ids)
        return config.max_seq_len - (longest - 1 if config.causal else 0)

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Score every label.

        Args:
            input_ids: right-padded prompts `(batch, seqlen)`.
            lengths: the prompts' lengths `(batch,)`, for causal models only.

        Returns:
            `(batch, num_labels)`. With lengths, log p(label | prompt) over all tokens of a label.
            Without, the assignment's score: the sum of the log-probabilities that the last column
            gives the tokens of a label.
        """
        if lengths is not None:
            return self._log_likelihoods(input_ids, lengths)
        log_probs = self._log_probs(input_ids, last_positions(input_ids))[:, 0]
        scores = [log_probs[:, ids].sum(dim=-1) for ids in self.label_name_ids]
        return torch.stack(scores, dim=-1)

    def _log_likelihoods(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Compute Σ_j log p(label_j | prompt, label_<j) of every label, `(batch, num_labels)`.

        The prompts are read once; labels of several tokens continue them through a cache.
        """
        batch_size, seqlen = input_ids.shape
        cache = None
        if self.uses_cache:
            max_len = seqlen + max(map(len, self.label_name_ids)) - 1
            cache = KVCache(self.llama, batch_size, max_len)
        first = self._log_probs(input_ids, last_positions(input_ids, lengths), cache)[:, 0]
        prompt_lengths = lengths.tolist()
        scores = []
        for ids in self.label_name_ids:
            score = first[:, ids[0]]  # (batch,)
            if cache is not None and len(ids) > 1:
                cache.lengths = prompt_lengths  # forget the padding and the label before
                label = input_ids.new_tensor(ids).expand(batch_size, -1)  # (batch, len(ids))
                others = self._log_probs(label[:, :-1], cache=cache)
                score = score + others.gather(-1, label[:, 1:, None]).sum(dim=(1, 2))
            scores.append(score)
        return torch.stack(scores, dim=-1)

    def _log_probs(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Log-probabilities of the next token at each position, `(batch, n, vocab_size)`."""
        hidden = self.llama.hidden_states(tokens, positions, cache)
        return F.log_softmax(self.llama.output(hidden).float(), dim=-1)


class LlamaEmbeddingClassifier(nn.Module):
    """A linear head on a sentence's last hidden state, or on the mean of all.

    Args:
        config: any object with `num_labels`, `hidden_dropout_prob`, what `load_backbone` takes, and
            `option`: "finetune" trains Llama and head, "pretrain" (the assignment's old word)
            freezes Llama and trains the head.

    Attributes:
        pooling: "mean" averages the states of a sentence, "last" takes that of its own last token.
            None is the default: the last column's state without a mask, as in the assignment, and
            "last" for a causal model.
        uses_cache: False, unlike the zero-shot classifier.
    """

    uses_cache = False

    def __init__(self, config: Any):
        super().__init__()
        self.num_labels = config.num_labels
        self.pooling: str | None = None
        self.llama = load_backbone(config)
        self.llama.requires_grad_(config.option != "pretrain")
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier_head = nn.Linear(self.llama.config.dim, self.num_labels)

    @property
    def reads_lengths(self) -> bool:
        """Whether `forward` takes the length of each sentence."""
        return self.llama.config.causal or self.pooling is not None

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Classify sentences.

        Args:
            input_ids: right-padded sentences `(batch, seqlen)`.
            lengths: the sentences' lengths `(batch,)`; None reads the last column, padding or not,
                as the assignment does.

        Returns:
            log-probabilities `(batch, num_labels)`.
        """
        if self.pooling == "mean":
            hidden = self.llama.hidden_states(input_ids)  # (batch, seqlen, dim)
            pooled = mean_state(hidden, lengths)  # (batch, dim)
        else:
            last = last_positions(input_ids, lengths)
            pooled = self.llama.hidden_states(input_ids, last)[:, 0]  # (batch, dim)
        return F.log_softmax(self.classifier_head(self.dropout(pooled)).float(), dim=-1)


SentenceClassifier = LlamaEmbeddingClassifier | LlamaZeroShotClassifier


def last_positions(input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Find the position of each sequence's last token, `(batch, 1)`.

    Args:
        input_ids: right-padded `(batch, seqlen)`.
        lengths: the sequences' lengths `(batch,)`; None takes the last column, padding or not.
    """
    if lengths is not None:
        return lengths[:, None] - 1
    batch_size, seqlen = input_ids.shape
    return torch.full((batch_size, 1), seqlen - 1, device=input_ids.device)


def mean_state(hidden: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Average the states of each sentence's tokens, without padding (arXiv 1908.10084, section 3).

    Args:
        hidden: `(batch, seqlen, dim)`.
        lengths: the sentences' lengths `(batch,)`; None averages all columns.

    Returns:
        `(batch, dim)`.
    """
    if lengths is None:
        return hidden.mean(dim=1)
    is_token = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    return (hidden * is_token[..., None]).sum(dim=1) / lengths[:, None]
