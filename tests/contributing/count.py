"""`--option count`: count the tokens of the training sentences."""

from dataclasses import dataclass
from typing import Self

from minllama.checkpoints.formats import find_tokenizer
from minllama.common.flags import DEMO_DATA, DEMO_MODEL, TaskSettings
from minllama.common.settings import flag
from minllama.text.labelled import read_labelled
from minllama.training import distributed
from tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CountSettings(TaskSettings):
    """The flags of counting."""

    title = "count"
    description = ""

    at_least: int = flag(0, "leave out shorter sentences", metavar="TOKENS")

    def resolved(self) -> Self:
        """Fill in demo files and the tokenizer."""
        settings = self.with_demo(DEMO_MODEL, DEMO_DATA)
        path = settings.tokenizer_path or find_tokenizer(settings.pretrained_model_path)
        return settings.replace(tokenizer_path=path)


def count(settings: CountSettings) -> None:
    """Print the number of tokens of the training sentences."""
    distributed.require_one_process("count")
    tokenizer = Tokenizer(settings.max_sentence_len, settings.tokenizer_path)
    sentences = [example.sentence for example in read_labelled(settings.train)]
    lengths = [len(tokenizer.encode(sentence, bos=True, eos=False)) for sentence in sentences]
    print(sum(length for length in lengths if length >= settings.at_least))
