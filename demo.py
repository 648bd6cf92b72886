"""The small model and the reviews in `data/demo/`, which stand in for files that are not there."""

import argparse
import os
import sys
from pathlib import Path

DEMO = Path(__file__).parent / "data" / "demo"
MODEL = {"pretrained_model_path": "model.pt"}
DATA = {
    "train": "reviews-train.txt",
    "dev": "reviews-dev.txt",
    "test": "reviews-test.txt",
    "label_names": "reviews-label-mapping.json",
}


def use_demo(args: argparse.Namespace, given: frozenset[str]) -> None:
    """Replace default paths whose files are absent, and say so on standard error.

    Train, dev, test and label names are replaced together, and only if all are absent and none of
    them is in `given`, the flags on the command line.
    """
    for stand_ins in (MODEL,) if args.option == "generate" else (MODEL, DATA):
        absent = [name for name in stand_ins if not Path(getattr(args, name)).exists()]
        complete = all((DEMO / file).is_file() for file in stand_ins.values())
        if len(absent) < len(stand_ins) or not complete or not given.isdisjoint(stand_ins):
            continue
        names = ", ".join(getattr(args, name) for name in absent)
        for name, file in stand_ins.items():
            setattr(args, name, demo_path(file))
        files = ", ".join(getattr(args, name) for name in stand_ins)
        print(
            f"{names}: not here, so {files} from this repository take their place; "
            "`bash setup.sh` fetches the assignment's",
            file=sys.stderr,
        )


def demo_path(file: str) -> str:
    """The path of a file of the demo, relative where the repository is the working folder."""
    relative = os.path.relpath(DEMO / file)
    return str(DEMO / file) if relative.startswith("..") else relative
