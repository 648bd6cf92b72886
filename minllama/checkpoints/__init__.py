"""One file for each format that weights are read from or written to.

A format gives tensors and a config, and never builds a model; `llama.load_pretrained` does.
"""
