"""The training sentences of SST-5 and CFIMDB, shuffled, for continued pre-training.

    .venv/bin/python -m experiments.task_text > tasks.txt

The report also takes it with labels: "It was" and a word for its label follow every sentence.
Reviews are then cut into sentences, each with its review's label.
"""

import random
import re

from experiments.runs import ROOT
from minllama.common.program import run_script, script_parser
from minllama.text.batches import Example
from minllama.text.labelled import SEPARATOR, load_label_names, read_labelled

SST, CFIMDB = (str(ROOT / "data" / name) for name in ("sst", "cfimdb"))
TEMPLATE = "{sentence} It was"
LABEL_WORDS = {  # that continue the template; each is one token of the demo model
    SST: "experiments/sst-label-words.json",
    CFIMDB: "experiments/cfimdb-label-words.json",
}


def task_text(labelled: bool) -> list[str]:
    """Lines `label ||| sentence`, of which pre-training takes the sentences.

    Args:
        labelled: cut reviews into sentences, and append the labels in words.

    Raises:
        FileNotFoundError: the data do not exist; `setup.sh` fetches them.
    """
    lines = []
    for data in (SST, CFIMDB):
        examples = read_labelled(f"{data}-train.txt")
        if labelled:
            words = load_label_names(ROOT / LABEL_WORDS[data])
            examples = [
                Example(f"{TEMPLATE.format(sentence=sentence)} {words[label]}", label)
                for text, label, _ in examples
                for sentence in re.split(r"(?<=\w [.!?]) ", text)
                if re.search(r"\w", sentence)
            ]
        lines += [f"{label}{SEPARATOR}{sentence}\n" for sentence, label, _ in examples]
    random.Random(0).shuffle(lines)
    return lines


def main() -> None:
    script_parser(__doc__).parse_args()
    print("".join(task_text(labelled=False)), end="")


if __name__ == "__main__":
    run_script(main)
