"""The tasks of a model: one file for each `--option`, told from top to bottom."""
