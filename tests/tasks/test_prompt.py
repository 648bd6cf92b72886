"""The prompts around a sentence, and calibrated zero-shot scores, against their definitions."""

import os

import pytest
import torch
from conftest import SENTENCES, make_llama, save_llama

from classifier import LlamaZeroShotClassifier
from minllama.common.errors import InputError
from minllama.tasks.prompt import Calibrated, ZeroShotConfig
from minllama.text.prompts import make_prompts

NAMES = ["bad", "fair enough", "good"]


@pytest.fixture
def make_zero_shot(tmp_path, tokenizer):
    """Makes a causal model's zero-shot classifier."""

    def make(names=NAMES, checkpoint=None):
        if checkpoint is None:
            checkpoint = save_llama(make_llama(scale=3.0), tmp_path / "z.pt")
        config = ZeroShotConfig(
            pretrained_model_path=checkpoint, num_labels=len(names), causal=True
        )
        return LlamaZeroShotClassifier(config, tokenizer, names)

    return make


def test_a_template_stands_around_the_sentence_however_short_it_was_cut(tokenizer):
    data = [("the plot is thin", 1, tokenizer.encode("the plot is thin", True, False)[:3])]
    template = "Film : {sentence} Is it {labels} ?  "
    ((text, label, ids),) = make_prompts(data, template, ["bad", "good"], tokenizer, causal=True)
    assert (text, label) == ("Film : the plot is thin Is it bad or good ?", 1)
    head, tail = (
        tokenizer.encode(part, False, False) for part in ("Film :", "Is it bad or good ?")
    )
    assert ids == [1, *head, *data[0][2][1:], *tail]
    ((text, _, ids),) = make_prompts(data, template, ["bad", "good"], tokenizer, causal=False)
    assert text == "Film : the plot is thin Is it bad or good ?  "
    assert ids == tokenizer.encode(text, True, False)


@pytest.mark.parametrize("template", ["no sentence", "{sentence} and {sentence}"])
def test_a_template_has_one_sentence(template, tokenizer):
    with pytest.raises(InputError, match="--prompt_template"):
        make_prompts([], template, NAMES, tokenizer, causal=True)


@pytest.mark.parametrize("method", ["contextual", "pmi"])
def test_calibration_divides_out_the_prior(method, make_zero_shot, tokenizer):
    model = make_zero_shot()
    model.llama.config.attention_dropout = 0.5  # which must not act
    for layer in model.llama.layers:
        layer.feed_forward.dropout.p = 0.5
    template = "{sentence} It is"
    calibrated = Calibrated(model, method, template)

    def probabilities(sentence):
        data = [(sentence, 0, tokenizer.encode(sentence, True, False))]
        ((_, _, ids),) = make_prompts(data, template, NAMES, tokenizer, causal=True)
        with torch.inference_mode():
            return model(torch.tensor([ids]), torch.tensor([len(ids)])).softmax(-1)[0]

    texts = ("N/A", "[MASK]", "") if method == "contextual" else ("",)
    prior = torch.stack([probabilities(text) for text in texts]).mean(0)
    expected = (probabilities("a thin plot") / prior).log()
    data = [("a thin plot", 0, tokenizer.encode("a thin plot", True, False))]
    ((_, _, ids),) = make_prompts(data, template, NAMES, tokenizer, causal=True)
    scores = calibrated(torch.tensor([ids]), torch.tensor([len(ids)]))[0]
    difference = scores - expected
    assert torch.allclose(difference, difference.mean().expand(3), atol=1e-4)
    if method == "pmi":  # the prompt alone says nothing about the labels
        alone = tokenizer.encode("It is", False, False)
        scores = calibrated(torch.tensor([[1, *alone]]), torch.tensor([1 + len(alone)]))[0]
        assert torch.allclose(scores, scores.mean().expand(3), atol=1e-4)


def test_a_long_content_free_prompt_is_cut_to_the_context(make_zero_shot, tokenizer):
    """From its left, as the prompts that are scored."""
    model = make_zero_shot()
    template = "{sentence} " + "a film about a film " * 40
    with pytest.warns(UserWarning, match="1 of 1 sentences do not fit"):
        calibrated = Calibrated(model, "pmi", template)
    ids = tokenizer.encode(template.removeprefix("{sentence} ").strip(), False, False)
    assert len(ids) > model.max_prompt_len
    cut = torch.tensor([[1, *ids[1 - model.max_prompt_len :]]])
    with torch.inference_mode():
        expected = model(cut, torch.tensor([cut.shape[1]])).log_softmax(-1)[0]
    assert torch.allclose(calibrated.prior, expected, atol=1e-4)


@pytest.mark.parametrize("method", ["contextual", "pmi"])
def test_calibrated_predictions_are_those_of_scoring_one_by_one(
    project, run_cli, make_zero_shot, tokenizer, method
):
    template = "{sentence} So it is"
    flags = ["--option", "prompt", "--causal", "--prompt_template", template, *project.flags]
    assert run_cli(*flags)[0] == 0
    output = project.path / "toy-dev-advanced-output.txt"
    plain = output.read_text().splitlines()
    assert run_cli(*flags, "--calibrate", method)[0] == 0
    model = make_zero_shot(["bad", "fair", "good"], "model.pt")
    calibrated = Calibrated(model, method, template)
    expected = {model: [], calibrated: []}
    for sentence in SENTENCES:
        ids = tokenizer.encode(f"{sentence} .", bos=True, eos=False)
        ids = torch.tensor([ids + tokenizer.encode("So it is", bos=False, eos=False)])
        for scorer, lines in expected.items():
            label = scorer(ids, torch.tensor([ids.shape[1]])).argmax().item()
            lines.append(f"{label} ||| {sentence} . So it is")
    assert plain == expected[model] != expected[calibrated]
    assert output.read_text().splitlines() == expected[calibrated]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--option", "prompt", "--calibrate", "pmi"], "--calibrate"),
        (["--option", "prompt", "--prompt_template", "x"], "--prompt_template"),
        (["--option", "finetune", "--calibrate", "pmi"], "acts only with --option prompt"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(project, run_cli, flags, named):
    before = sorted(os.listdir(project.path))
    code, _, err = run_cli(*project.flags, *flags)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err
    assert sorted(os.listdir(project.path)) == before
