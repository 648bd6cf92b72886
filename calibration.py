"""`--calibrate`: zero-shot scores less what the prompt alone makes of the labels."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from classifier import LlamaZeroShotClassifier
from dataset import fit_context
from prompts import make_prompts
from tokenizer import Tokenizer
from utils import adder

CONTENT_FREE = {
    "contextual": ("N/A", "[MASK]", ""),  # arXiv 2102.09690, section 5
    "pmi": ("",),  # the domain prompt, arXiv 2104.08315, section 3
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser.add_argument_group("calibration"))
    help = "divide a label's probability by that after prompts without content, or without sentence"
    add("--calibrate", choices=tuple(CONTENT_FREE), help=f"{help}; needs --causal")


class Calibrated(nn.Module):
    """A zero-shot classifier whose scores are log p(label | prompt) - log p(label | no content).

    Contextual calibration takes the mean of the labels' normalized probabilities over prompts
    around "N/A", "[MASK]" and nothing; PMI takes the probabilities after the prompt around nothing.

    Args:
        model: a causal model's classifier.
        method: "contextual" or "pmi".
        template: of the prompts.
    """

    def __init__(
        self,
        model: LlamaZeroShotClassifier,
        method: str,
        template: str,
        label_names: list[str],
        tokenizer: Tokenizer,
    ):
        super().__init__()
        self.model = model
        model.eval()
        untruncated = Tokenizer(tokenizer_model=tokenizer.model_path)
        empty = [(text, 0, untruncated.encode(text, True, False)) for text in CONTENT_FREE[method]]
        prompts = make_prompts(empty, template, label_names, tokenizer, causal=True)
        device = next(model.parameters()).device
        (prompts,) = fit_context(prompts, max_len=model.max_prompt_len, keep="last")
        rows = [torch.tensor([ids], device=device) for _, _, ids in prompts]
        with torch.inference_mode():
            scores = [model(row, torch.tensor([row.shape[1]], device=device)) for row in rows]
        log_probs = F.log_softmax(torch.cat(scores), dim=-1)
        self.prior = log_probs.exp().mean(dim=0).log()

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Calibrated log-probabilities `(batch, num_labels)`, up to a constant of the row."""
        return self.model(input_ids, lengths) - self.prior
