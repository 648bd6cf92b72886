"""The vocabulary in exported models: other programs must give each text the ids that we give it."""

import json
import random
import subprocess
import sys

import pytest
import sentencepiece
import torch
from conftest import SENTENCES, make_llama

from config import LlamaConfig
from llama import load_pretrained
from minllama.checkpoints import llama2c, pt
from minllama.checkpoints.convert import convert
from minllama.checkpoints.hf_tokenizer import files
from minllama.checkpoints.layout import Checkpoint
from minllama.common.errors import InputError
from minllama.common.flags import DEMO
from minllama.text.tokenizer_training import train_tokenizer
from tokenizer import Tokenizer


def odd_texts(n: int) -> list[str]:
    """Texts with line breaks at both ends, runs of spaces, emoji, and characters that are bytes."""
    rng = random.Random(0)
    parts = [*"abe .,'\n\t\r0189é猫🎬▁<>", "  ", "\n\n", "The", " film", "<0x41>", "\u00a0", "</"]
    texts = ["".join(rng.choices(parts, k=rng.randrange(40))) for _ in range(n)]
    runs = [before + sign * k for before in ("", "a", "\n") for sign in " \n" for k in range(1, 40)]
    return texts + runs + [f"\n{text}  \n" for text in SENTENCES]


def train(path, **changes) -> Tokenizer:
    """A tokenizer of SentencePiece with other settings than Llama's."""
    settings = {"vocab_size": 320, "model_type": "bpe", "byte_fallback": True}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(path.with_suffix("")),
        minloglevel=2,
        **settings | changes,
    )
    return Tokenizer(tokenizer_model=path)


@pytest.fixture(params=["llama", "demo", "new", "without bytes", "other ids"])
def any_tokenizer(request, tmp_path) -> Tokenizer:
    path = tmp_path / "any.model"
    if request.param == "llama":
        return Tokenizer(tokenizer_model=request.getfixturevalue("assets") / "tokenizer.model")
    if request.param == "demo":
        return Tokenizer(tokenizer_model=DEMO / "tokenizer.model")
    if request.param == "other ids":
        return train(path, pad_id=0, unk_id=1, bos_id=2, eos_id=3)
    if request.param == "without bytes":
        with pytest.warns(UserWarning, match="become <unk>"):
            train_tokenizer(lambda: SENTENCES * 20, 60, path)
    else:
        train_tokenizer(lambda: SENTENCES * 20, 320, path)
    return Tokenizer(tokenizer_model=path)


def test_tokenizer_json_gives_our_ids_and_texts(any_tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(files(any_tokenizer)["tokenizer.json"]))
    for text in odd_texts(1000):
        ids = any_tokenizer.encode(text, bos=True, eos=False)
        assert theirs.encode(text).ids == ids, text
        assert (
            theirs.decode(ids) == any_tokenizer.decode(ids)
            or any_tokenizer.sp_model.unk_id() in ids
        )


def save(tokenizer: Tokenizer, folder) -> Checkpoint:
    """Write a causal model for a tokenizer, and the tokenizer beside it."""
    config = LlamaConfig(tokenizer.n_words, 8, 0.0, 1, 2, 1, causal=True)
    tensors = make_llama(**vars(config)).state_dict()
    folder.mkdir()
    pt.save(Checkpoint(config, tensors, "random"), folder / "model.pt")
    (folder / "tokenizer.model").write_bytes(tokenizer.model_path.read_bytes())
    return pt.load(folder / "model.pt")


HIDE = """
import sys
sys.modules |= dict.fromkeys(("sentencepiece", "google.protobuf"))
"""
PRINT_IDS = """
import json, sys, transformers
texts = json.load(sys.stdin)
for is_fast in (True, False):
    tokenizer = transformers.AutoTokenizer.from_pretrained("hf", use_fast=is_fast)
    print(json.dumps([tokenizer(text)["input_ids"] for text in texts]))
"""


@pytest.mark.parametrize("hide", ["", HIDE], ids=["with", "without"])
def test_transformers_gives_our_ids(tmp_path, monkeypatch, hide):
    """Also without the packages that read `tokenizer.model`."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    convert(str(DEMO / "model.pt"), "hf", "hf")
    tokenizer, texts = Tokenizer(tokenizer_model="hf/tokenizer.model"), odd_texts(1000)
    expected = [tokenizer.encode(text, bos=True, eos=False) for text in texts]
    command = [sys.executable, "-c", hide + PRINT_IDS]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert json.loads(line) == expected


def test_a_tokenizer_of_another_model_is_not_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(train(tmp_path / "own.model"), tmp_path / "in")
    train(tmp_path / "in/tokenizer.model", vocab_size=310)
    for to in ("hf", "llama2c"):
        with pytest.raises(InputError, match=r"in/tokenizer.model .* with --tokenizer-path"):
            convert("in/model.pt", f"out-{to}", to)
    convert("in/model.pt", "out.bin", "llama2c", tokenizer_path="own.model")
    own = Tokenizer(tokenizer_model="own.model")
    assert (tmp_path / "tokenizer.bin").read_bytes() == own.to_llama2c()
    without_bos = train(tmp_path / "without.model", bos_id=-1)
    with pytest.raises(InputError, match="no pieces for BOS"):
        without_bos.to_llama2c()


def test_special_ids_are_the_tokenizers(tmp_path, monkeypatch):
    """A text ends at BOS too, as it does here."""
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    save(train(tmp_path / "t.model", pad_id=0, unk_id=1, bos_id=2, eos_id=3), tmp_path / "a")
    convert("a/model.pt", "hf", "hf")
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": [3, 2]}
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (2, 3)
    convert("hf", "b.pt", "pt")
    llama = load_pretrained("b.pt")
    assert llama.config.stop_ids == (2, 3)
    prompt = torch.tensor([[2, 9]])
    whole = llama.generate(prompt, 9, 0.0, stop_ids=())
    llama.config.eos_token_id = int(whole[0, -1])
    end = whole[0, 2:].tolist().index(llama.config.eos_token_id)
    assert llama.generate(prompt, 9, 0.0).equal(whole[:, : 2 + end])


def test_llama2c_has_the_bytes_at_three(any_tokenizer, tmp_path, monkeypatch):
    """The tokenizer that goes with the moved rows gives every text the moved ids."""
    monkeypatch.chdir(tmp_path)
    checkpoint = save(any_tokenizer, tmp_path / "in")
    (tmp_path / "out").mkdir()
    if any_tokenizer.pad_id == any_tokenizer.sp_model.unk_id():
        with pytest.raises(InputError, match="no pieces for BOS, EOS and the 256 bytes"):
            convert("in/model.pt", "out/model.bin", "llama2c")
        assert not list((tmp_path / "out").iterdir())
        return
    convert("in/model.pt", "out/model.bin", "llama2c")
    path = tmp_path / "out/tokenizer.model"
    moved = Tokenizer(tokenizer_model=path) if path.exists() else any_tokenizer
    assert (tmp_path / "out/tokenizer.bin").read_bytes() == moved.to_llama2c()
    assert (moved.sp_model.unk_id(), moved.bos_id, moved.eos_id, moved.pad_id) == (0, 1, 2, 3)
    ours, theirs = (c.tensors["output.weight"] for c in (checkpoint, llama2c.load("out/model.bin")))
    for text in odd_texts(100):
        old, new = (t.encode(text, bos=True, eos=True) for t in (any_tokenizer, moved))
        assert ours[old].equal(theirs[new]) and moved.decode(new) == any_tokenizer.decode(old)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"model_type": "unigram", "vocab_size": 300}, "is not a BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes texts"),
        ({"remove_extra_whitespaces": True}, "changes texts"),
        ({"add_dummy_prefix": False}, "changes texts"),
        ({"user_defined_symbols": ["a", "<sep>"]}, "symbols that a user defined, such as '<sep>'"),
    ],
)
def test_other_tokenizers_are_not_written_as_llamas(tmp_path, changes, fault):
    tokenizer = train(tmp_path / "t.model", **changes)
    for export in (files, Tokenizer.to_llama2c):
        with pytest.raises(InputError, match=fault):
            export(tokenizer)
