"""Two sentence classifiers over a Llama: by prompting, and with a trained head."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llama import Llama, load_pretrained
from minllama.checkpoints import formats
from minllama.common.errors import InputError
from minllama.inference.cache import KVCache
from minllama.inference.decoding import last_column
from tokenizer import Tokenizer


def load_backbone(config: Any) -> Llama:
    """The Llama of a classifier, in float32.

    Args:
        config: any object with `pretrained_model_path`. Optionally `causal` overrides the
            checkpoint's, `init_weights` False draws no initial weights, and with `keep_bfloat16`
            matrices that the file has in bfloat16 stay so, and stay in the file, mapped into
            memory; nothing is drawn then. They must not train.
    """
    checkpoint = formats.load(config.pretrained_model_path)
    causal = getattr(config, "causal", None)
    matrices = (tensor for tensor in checkpoint.tensors.values() if tensor.dim() == 2)
    keep = getattr(config, "keep_bfloat16", False)
    if keep and all(matrix.dtype == torch.bfloat16 for matrix in matrices):
        llama = load_pretrained(checkpoint, causal=causal, init_weights=False, dtype=None)
        for module in llama.modules():
            if not isinstance(module, nn.Linear):  # what is added to the residual stream, or scales
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(parameter.float()))
        return llama
    init_weights = getattr(config, "init_weights", True)
    return load_pretrained(checkpoint, causal=causal, init_weights=init_weights)


class LlamaZeroShotClassifier(nn.Module):
    """Asks which label's name continues a prompt best. Nothing is trained.

    Args:
        config: any object with `num_labels`, and what `load_backbone` takes.
        tokenizer: turns the label names into ids.
        label_names: one name per label.
    """

    def __init__(self, config: Any, tokenizer: Tokenizer, label_names: Sequence[str]):
        super().__init__()
        if len(label_names) != config.num_labels:
            raise InputError(f"{len(label_names)} label names for {config.num_labels} labels")
        self.num_labels = config.num_labels
        self.llama = load_backbone(config)
        self.llama.requires_grad_(False)
        self.tokenizer = tokenizer
        self.label_names = list(label_names)
        self.label_name_ids = [
            tokenizer.encode(name, bos=False, eos=False, truncate=False) for name in label_names
        ]

    @property
    def reads_lengths(self) -> bool:
        """Whether batches are to tell each row's own length."""
        return self.llama.config.causal

    @property
    def uses_cache(self) -> bool:
        """Whether labels continue the prompt, rather than being read off its last state."""
        return self.llama.config.causal and max(map(len, self.label_name_ids)) > 1

    @property
    def max_prompt_len(self) -> int:
        """The context in tokens, less what a causal model needs for the longest label."""
        config = self.llama.config
        longest = max(len(ids) for ids in self.label_name_ids)
        return config.max_seq_len - (longest - 1 if config.causal else 0)

    def forward(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Score every label.

        Args:
            input_ids: right-padded prompts `(batch, seqlen)`.
            lengths: the prompts' lengths `(batch,)`, or None.
            offset: added to the prompts' embeddings, `(batch, seqlen, dim)`.

        Returns:
            `(batch, num_labels)`. With lengths, log p(label | prompt) over all of a label's tokens,
            which needs causal attention. Without, the assignment's score: the sum of the
            log-probabilities that the last column gives each of the label's tokens.
        """
        if lengths is not None and not self.llama.config.causal:
            raise ValueError("only a causal model can score prompts by their lengths")
        if lengths is None:
            hidden = self.llama.hidden_states(input_ids, last_column(input_ids), offset=offset)
            log_probs = F.log_softmax(self.llama.output(hidden[:, 0]).float(), dim=-1)
            scores = [log_probs[:, ids].sum(dim=-1) for ids in self.label_name_ids]
        else:
            scores = self._log_likelihoods(input_ids, lengths, offset)
        return torch.stack(scores, dim=-1)

    def _log_likelihoods(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, offset: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """For each label Σ_j log p(label_j | prompt, label_<j), `(batch,)`.

        The prompts are read once; labels of several tokens continue them through a cache.
        """
        batch_size, seqlen = input_ids.shape
        cache = None
        if self.uses_cache:
            room = seqlen + max(len(ids) for ids in self.label_name_ids) - 1
            cache = KVCache(self.llama.config, batch_size, room, input_ids.device)
        last = lengths[:, None] - 1
        hidden = self.llama.hidden_states(input_ids, last, cache=cache, offset=offset)
        first = F.log_softmax(self.llama.output(hidden[:, 0]).float(), dim=-1)
        prompt_lengths = lengths.tolist()
        scores = []
        for ids in self.label_name_ids:
            score = first[:, ids[0]]
            if len(ids) > 1:
                cache.lengths = prompt_lengths  # forgets padding and the label before
                beginning = input_ids.new_tensor(ids[:-1]).expand(batch_size, -1)
                hidden = self.llama.hidden_states(beginning, cache=cache)
                log_probs = F.log_softmax(self.llama.output(hidden).float(), dim=-1)
                following = input_ids.new_tensor(ids[1:]).expand(batch_size, -1)
                score = score + log_probs.gather(-1, following[..., None]).sum(dim=(1, 2))
            scores.append(score)
        return scores


class LlamaEmbeddingClassifier(nn.Module):
    """A linear head on a sentence's last hidden state, or on the mean of all.

    Args:
        config: any object with `num_labels`, `hidden_dropout_prob`, what `load_backbone` takes, and
            `option`: "finetune" trains Llama and head, "pretrain" (the assignment's old word)
            freezes Llama and trains the head.

    Attributes:
        pooling: "mean" reads the mean of a row's states, "last" its own last token's; None is as
            the assignment has it without a mask, the last column's, and as "last" for a causal
            model.
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
        """Whether batches are to tell each row's own length."""
        return self.llama.config.causal or self.pooling is not None

    def forward(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Classify each row.

        Args:
            input_ids: right-padded sentences `(batch, seqlen)`.
            lengths: the sentences' lengths `(batch,)`; None reads the last column, as the
                assignment does, padding or not.
            offset: added to the sentences' embeddings, `(batch, seqlen, dim)`.

        Returns:
            log-probabilities `(batch, num_labels)`.
        """
        if self.pooling == "mean":
            hidden = self.llama.hidden_states(input_ids, offset=offset)  # (batch, seqlen, dim)
            pooled = mean_state(hidden, lengths)  # (batch, dim)
        else:
            last = last_column(input_ids) if lengths is None else lengths[:, None] - 1
            pooled = self.llama.hidden_states(input_ids, last, offset=offset)[:, 0]  # (batch, dim)
        return F.log_softmax(self.classifier_head(self.dropout(pooled)).float(), dim=-1)


def mean_state(hidden: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """The mean of the states of each row's tokens, without padding (arXiv 1908.10084, section 3).

    Args:
        hidden: `(batch, seqlen, dim)`.
        lengths: of the rows `(batch,)`; None takes every column for a token.

    Returns:
        `(batch, dim)`.
    """
    if lengths is None:
        return hidden.mean(dim=1)
    real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    return (hidden * real[..., None]).sum(dim=1) / lengths[:, None]
