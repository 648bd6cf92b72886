"""One file for each format that weights come in or go out as: dicts of tensors and a config.

A format never builds a model; `llama.load_pretrained` does.
"""
