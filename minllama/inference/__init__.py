"""Decoding of any model: the cache, sampling, and the generator, texts in and texts out."""
