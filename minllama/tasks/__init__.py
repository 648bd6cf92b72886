"""The tasks of `run_llama.py`: one file per `--option`, to be read from top to bottom."""
