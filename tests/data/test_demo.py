"""What the repository brings in `data/demo/`: a model, its tokenizer, and reviews."""

import shutil

import numpy as np
import pytest
import torch
from make_fixtures import sanity_fixture

import minllama.common.flags
import sanity_check
from experiments.bits_per_byte import bits_per_byte, read_stories
from experiments.make_reviews import write_reviews
from llama import load_pretrained
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.flags import DEMO
from minllama.text.labelled import load_label_names, read_labelled
from tokenizer import Tokenizer

SPLITS = {"train": 1000, "dev": 200, "test": 200}


@pytest.fixture(scope="module")
def llama():
    return load_pretrained(DEMO / "model.pt").eval()


@pytest.fixture(scope="module")
def demo_tokenizer():
    return Tokenizer(tokenizer_model=DEMO / "tokenizer.model")


@pytest.fixture(scope="module")
def reviews():
    """The labels and the sentences of each split."""
    files = {split: read_labelled(DEMO / f"reviews-{split}.txt") for split in SPLITS}
    return {
        split: ([example.label for example in file], [example.sentence for example in file])
        for split, file in files.items()
    }


def test_the_model_is_small_causal_and_grouped(llama, demo_tokenizer):
    assert (DEMO / "model.pt").stat().st_size < 16_000_000
    assert 5e6 < sum(p.numel() for p in llama.parameters()) < 7.5e6
    assert llama.config.tokenizer == demo_tokenizer.fingerprint
    assert llama.config.causal and llama.config.n_kv_heads < llama.config.n_heads
    assert llama.vocab_size == demo_tokenizer.n_words
    stored = read_checkpoint(DEMO / "model.pt")["model"].values()
    assert {tensor.dtype for tensor in stored} == {torch.float16}


def test_it_predicts_unseen_stories(llama, demo_tokenizer, real_assets):
    stories = read_stories(real_assets("tinystories") / "dev.txt")
    assert bits_per_byte(llama, demo_tokenizer, stories) < 0.72


def test_the_sanity_values_are_an_independent_forward_pass(llama):
    committed = read_checkpoint(DEMO / "sanity_check.data")
    computed = sanity_fixture(DEMO / "model.pt")
    assert torch.equal(committed["tokens"], computed["tokens"])
    for name in ("unmasked", "causal"):
        for part in ("logits", "hidden_states"):
            torch.testing.assert_close(committed[name][part], computed[name][part])


def test_the_sanity_check_fails_another_model(tmp_path, monkeypatch):
    saved = read_checkpoint(DEMO / "model.pt")
    saved["model"]["layers.3.attention.compute_key.weight"][0] *= 1.5
    torch.save(saved, tmp_path / "model.pt")
    shutil.copy(DEMO / "sanity_check.data", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(minllama.common.flags, "DEMO", tmp_path)
    with pytest.raises(SystemExit, match="wrong: logits differ by up to"):
        sanity_check.main()


def test_the_reviews_are_what_the_generator_writes(tmp_path):
    write_reviews(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (DEMO / path.name).read_bytes(), path.name
    assert len(list(tmp_path.iterdir())) == 4


def test_classes_are_balanced(reviews):
    names = load_label_names(DEMO / "reviews-label-mapping.json")
    assert names == ["awful", "bad", "average", "good", "excellent"]
    for split, size in SPLITS.items():
        labels, sentences = reviews[split]
        assert np.bincount(labels).tolist() == [size // 5] * 5
        assert len(set(sentences)) == size
