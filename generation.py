"""`--option generate`: continue a text."""

import argparse
from pathlib import Path

import torch

from llama import load_pretrained
from tokenizer import Tokenizer, check_vocabulary
from utils import atomic_write, pick_device


def generate_sentence(
    args: argparse.Namespace,
    prefix: str,
    outfile: str | Path,
    max_new_tokens: int = 75,
    temperature: float = 0.0,
) -> None:
    """Load the model, continue `prefix`, print the text and write it to a file.

    Args:
        args: the command line's; of it are used `use_gpu`, `pretrained_model_path`,
            `max_sentence_len` and, where they are there, `causal` and `tokenizer_path`.
        temperature: 0 takes the likeliest token each time.
    """
    device = pick_device(args.use_gpu)
    llama = load_pretrained(args.pretrained_model_path, causal=getattr(args, "causal", None))
    tokenizer = Tokenizer(args.max_sentence_len, getattr(args, "tokenizer_path", None))
    check_vocabulary(tokenizer, llama.vocab_size, args.pretrained_model_path)
    llama = llama.to(device).eval()
    print(f"load model from {args.pretrained_model_path}")

    ids = tokenizer.encode(prefix, bos=True, eos=False)
    output = llama.generate(torch.tensor([ids], device=device), max_new_tokens, temperature)
    sentence = tokenizer.decode(output[0].tolist())
    print(f"Temperature is {temperature}")
    print(sentence)
    print("---------------")
    with atomic_write(outfile) as file:
        file.write(sentence)
    print(f"Wrote generated sentence to {outfile}.")
