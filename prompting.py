"""`--option prompt`: zero-shot classification by asking for the label."""

import argparse
import time
from collections.abc import Sequence
from types import SimpleNamespace

from batching import make_loader
from classifier import LlamaZeroShotClassifier
from dataset import (
    append_text,
    check_labels,
    create_data,
    fit_context,
    load_label_names,
)
from evaluation import check_out_files, model_eval, report_results
from packing import pack
from tokenizer import Tokenizer, check_vocabulary
from utils import pick_device, with_defaults


def question(label_names: Sequence[str]) -> str:
    """The text between a sentence and its label, with a space at its end."""
    if len(label_names) == 2:
        choices = " or ".join(label_names)
    else:
        choices = f"{', '.join(label_names[:-1])}, or {label_names[-1]}"
    return f"Is this movie {choices}? This movie is "


def test_with_prompting(args: argparse.Namespace) -> None:
    """Classify dev and test, print the accuracies and write the predictions.

    Without a mask this is the assignment's way: `max_sentence_len` cuts sentence and question
    together, and the last column of the padded batch is read. With causal attention the question
    stays whole, without its last space so that the label's name begins with a word, and every
    row's own last token is read.
    """
    args = with_defaults(args)
    check_out_files(args, "prompting")
    label_names = load_label_names(args.label_names)
    for filename in (args.train, args.dev, args.test):
        check_labels(filename, len(label_names), args.label_names)
    device = pick_device(args.use_gpu)
    tokenizer = Tokenizer(args.max_sentence_len, args.tokenizer_path)
    config = SimpleNamespace(
        pretrained_model_path=args.pretrained_model_path,
        num_labels=len(label_names),
        causal=args.causal,
    )
    untruncated = Tokenizer(tokenizer_model=tokenizer.model_path)
    model = LlamaZeroShotClassifier(config, untruncated, label_names).to(device)
    check_vocabulary(tokenizer, model.llama.vocab_size, args.pretrained_model_path)
    causal = model.llama.config.causal
    if causal or args.dtype != "float32":  # else it stays the assignment's, to the digit
        pack(model.llama, args.dtype)

    create_data(args.train, tokenizer, "train")  # only for its count, which the assignment prints
    suffix = question(label_names)
    if causal:
        dev_data, test_data = (
            append_text(create_data(file, tokenizer, flag, eos=False), suffix.rstrip(), untruncated)
            for file, flag in ((args.dev, "valid"), (args.test, "test"))
        )
        room_for_label = max(len(ids) for ids in model.label_name_ids) - 1
    else:
        dev_data = create_data(args.dev, tokenizer, "valid", eos=False, prompt_suffix=suffix)
        test_data = create_data(args.test, tokenizer, "test", eos=False, prompt_suffix=suffix)
        room_for_label = 0
    max_len = model.llama.config.max_seq_len - room_for_label
    dev_data, test_data = fit_context(dev_data, test_data, max_len=max_len, keep="last")
    results, seconds = {}, {}
    for split, data in (("dev", dev_data), ("test", test_data)):
        start = time.perf_counter()
        results[split] = model_eval(make_loader(data, args, causal=causal), model, device)
        seconds[split] = time.perf_counter() - start
    report_results(args, results, seconds, device)


test_with_prompting.__test__ = False  # not a test of pytest's, whatever its name
