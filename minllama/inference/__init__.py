"""The cache, sampling, decoding of any model; packed, low-precision and fast forms of ours.

What is put into a model here is tested to equal the plain line in `llama.py`.
"""
