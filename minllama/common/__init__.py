"""Errors, whole files, settings, progress and the end of programs: no PyTorch in it."""
