"""Runs `run_llama.py` several times in one process group, since a start takes seconds.

`several_runs.py RUNS`, where RUNS is a JSON list. A run is a list: the optimizer step before which
it is interrupted, 0 for none, and flags. A dict among the flags has more of them by rank.
"""

import contextlib
import json
import sys

from conftest import interrupted_at

import run_llama
from minllama.common.program import run_script
from minllama.training import distributed


def main() -> None:
    runs = json.loads(sys.argv[1])
    with distributed.process_group():
        distributed.process_group = contextlib.nullcontext  # `run_llama.main` would enter it again
        for stop, *flags in runs:
            sys.argv = ["run_llama.py"]
            for flag in flags:
                own = flag.get(str(distributed.rank()), []) if isinstance(flag, dict) else [flag]
                sys.argv += own
            with interrupted_at(stop), contextlib.suppress(KeyboardInterrupt):
                run_llama.main()


if __name__ == "__main__":
    run_script(main)
