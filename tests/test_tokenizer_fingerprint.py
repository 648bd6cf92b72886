"""Weights carry the fingerprint of their tokenizer, and meet no other one of the same size."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
from conftest import SENTENCES, assert_refused

from classifier import LlamaZeroShotClassifier
from minllama.checkpoints import convert
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.errors import InputError
from tokenizer import Tokenizer

OTHER = ["--tokenizer-path", "other.model"]
LOAD = ["--load", "finetune-1-2e-05.pt"]


@pytest.fixture
def other(project) -> str:
    """A tokenizer of as many pieces as the project's."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence[::-1] for sentence in SENTENCES] * 20),
        model_prefix="other",
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        minloglevel=2,
    )
    return "other.model"


def test_a_saved_classifier_meets_its_own_tokenizer_only(project, other, run_cli):
    assert run_cli("--option", "finetune", *project.flags)[0] == 0
    Path("s.txt").write_text("a warm film\n")
    for flags in (["--option", "predict", "--input", "s.txt"], ["--option", "finetune"]):
        assert_refused(run_cli(*flags, *LOAD, *OTHER), other, "--tokenizer-path")
        shutil.copy("tokenizer.model", "same.model")
        assert run_cli(*flags, *LOAD, "--tokenizer-path", "same.model")[0] == 0


def test_pretrained_weights_meet_their_own_tokenizer_only(project, other, run_cli):
    text = ["--text", "data/toy-train.txt", "--steps", "2", "--batch_size", "2"]
    text += ["--max_seq_len", "8", "--split", "1", "0", "0"]
    pretrain = ["--option", "pretrain", *text, "--output_dir"]
    assert run_cli(*pretrain, "run", "--pretrained-model-path", "model.pt")[0] == 0
    assert read_checkpoint("run/model.pt")["model_args"]["tokenizer"] is not None
    trained = ["--pretrained-model-path", "run/model.pt"]
    assert run_cli(*trained, "--max_new_tokens", "2")[0] == 0
    for option in ("generate", "prompt", "finetune", "predict"):
        more = ["--input", "data/toy-dev.txt"] if option == "predict" else []
        flags = [*project.flags, *trained, *OTHER, *more]
        assert_refused(run_cli("--option", option, *flags), other, "run/model.pt")
    assert_refused(run_cli(*pretrain, "run2", *trained, *OTHER), other, "run/model.pt")
    config = SimpleNamespace(pretrained_model_path="run/model.pt", num_labels=2)
    with pytest.raises(InputError, match="not the tokenizer"):
        LlamaZeroShotClassifier(config, Tokenizer(tokenizer_model=other), ["bad", "good"])
    shutil.copy(other, "run/tokenizer.model")
    with pytest.raises(InputError, match="not the tokenizer"):
        convert.convert("run/model.pt", "hf", "hf")
    assert not Path("hf").exists()
