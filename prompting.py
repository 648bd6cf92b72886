"""`--option prompt`: zero-shot classification by asking for the label."""

import argparse
import functools
from types import SimpleNamespace

import methods
from batching import make_loader
from calibration import Calibrated
from classifier import LlamaZeroShotClassifier
from dataset import check_labels, create_data, fit_context, load_label_names
from evaluation import check_out_files, model_eval, report_results
from packing import pack
from prompts import frame, make_prompts
from tokenizer import Tokenizer, check_vocabulary
from utils import InputError, pick_device, with_defaults


def test_with_prompting(args: argparse.Namespace) -> None:
    """Classify dev and test, print the accuracies and write the predictions.

    Without a mask this is the assignment's way: `max_sentence_len` cuts sentence and question
    together, and the last column of the padded batch is read. With causal attention the question
    stays whole, and every row's own last token is read.
    """
    args = with_defaults(args, methods.defaults())
    check_out_files(args, methods.out_file_kinds(args, "prompting"))
    label_names = load_label_names(args.label_names)
    frame(args.prompt_template, label_names)
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
    if args.calibrate and not causal:
        raise InputError("--calibrate: scores without a mask depend on the batch; add --causal")
    max_len = model.max_prompt_len
    if causal or args.dtype != "float32":  # else it stays the assignment's, to the digit
        pack(model.llama, args.dtype)
    if args.calibrate:
        settings = (args.calibrate, args.prompt_template, label_names, tokenizer)
        model = Calibrated(model, *settings)

    create_data(args.train, tokenizer, "train")  # only for its count, which the assignment prints
    splits = {}
    for split, file in (("dev", args.dev), ("test", args.test)):
        data = create_data(file, tokenizer, split, eos=False)
        splits[split] = make_prompts(
            data, args.prompt_template, label_names, tokenizer, causal=causal
        )
    fitting = fit_context(*splits.values(), max_len=max_len, keep="last")
    loaders = {
        split: make_loader(data, args, causal=causal)
        for split, data in zip(splits, fitting, strict=True)
    }
    evaluate = functools.partial(model_eval, model=model, device=device)
    report_results(args, loaders, evaluate, device, label_names)


test_with_prompting.__test__ = False  # not a test of pytest's, whatever its name
