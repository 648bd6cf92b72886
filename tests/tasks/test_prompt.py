"""Prompts, and calibrated zero-shot scores, against their definitions."""

import pytest
import torch
from conftest import SENTENCES

from minllama.tasks.prompt import PromptSettings, zero_shot_classifier
from minllama.text.batches import Example
from minllama.text.prompts import make_prompts

NAMES = ["bad", "fair enough", "good"]
FREE = {"contextual": ("N/A", "[MASK]", ""), "pmi": ("",)}


@pytest.fixture
def make_classifier(project):
    """Makes a causal zero-shot classifier of the project's model."""

    def make(template="{sentence} It is", names=NAMES, **flags):
        settings = PromptSettings(
            option="prompt",
            pretrained_model_path="model.pt",
            tokenizer_path="tokenizer.model",
            causal=True,
            prompt_template=template,
            **flags,
        )
        return zero_shot_classifier(settings, names)

    return make


@torch.inference_mode()
def scores(classifier, sentence: str) -> torch.Tensor:
    """The scores of a sentence's labels, `(num_labels,)`."""
    ((example,),) = classifier.tokenize([Example(sentence, 0)])
    return classifier.model(torch.tensor([example.ids]), torch.tensor([len(example.ids)]))[0]


def up_to_a_constant(found: torch.Tensor, expected: torch.Tensor) -> bool:
    difference = found - expected
    return torch.allclose(difference, difference.mean().expand_as(difference), atol=1e-4)


def test_a_template_surrounds_the_sentence_however_short_it_was_truncated(tokenizer):
    data = [("the plot is thin", 1, tokenizer.encode("the plot is thin", True, False)[:3])]
    template = "Film : {sentence} Is it {labels} ?  "
    ((text, label, ids),) = make_prompts(data, template, ["bad", "good"], tokenizer, causal=True)
    assert (text, label) == ("Film : the plot is thin Is it bad or good ?", 1)
    head, tail = (
        tokenizer.encode(piece, False, False) for piece in ("Film :", "Is it bad or good ?")
    )
    assert ids == [1, *head, *data[0][2][1:], *tail]
    ((text, _, ids),) = make_prompts(data, template, ["bad", "good"], tokenizer, causal=False)
    assert text == "Film : the plot is thin Is it bad or good ?  "
    assert ids == tokenizer.encode(text, True, False)


@pytest.mark.parametrize("method", ["contextual", "pmi"])
def test_calibration_divides_by_the_prior(method, make_classifier):
    plain, calibrated = make_classifier(), make_classifier(calibrate=method)
    prior = torch.stack([scores(plain, text).softmax(-1) for text in FREE[method]]).mean(0)
    expected = (scores(plain, "a thin plot").softmax(-1) / prior).log()
    assert up_to_a_constant(scores(calibrated, "a thin plot"), expected)
    if method == "pmi":  # the prompt alone says nothing about the labels
        assert up_to_a_constant(scores(calibrated, ""), torch.zeros(3))


def test_a_long_content_free_prompt_is_truncated_at_its_beginning(make_classifier, tokenizer):
    template = "{sentence} " + "a film about a film " * 40
    with pytest.warns(UserWarning, match="1 of 1 sentences do not fit"):
        model = make_classifier(template, calibrate="pmi").model
    ids = tokenizer.encode(template.removeprefix("{sentence} ").strip(), False, False)
    ids = torch.tensor([[1, *ids[1 - model.max_prompt_len :]]])
    with torch.inference_mode():
        expected = make_classifier().model(ids, torch.tensor([ids.shape[1]])).log_softmax(-1)[0]
    assert torch.allclose(model.prior, expected, atol=1e-4)


@pytest.mark.parametrize("method", [None, "pmi"])
def test_predictions_are_those_of_sentences_one_by_one(project, run_cli, make_classifier, method):
    template = "{sentence} So it is"
    flags = ["--option", "prompt", "--causal", "--prompt_template", template, *project.flags]
    calibration = ["--calibrate", method] if method else []
    assert run_cli(*flags, *calibration)[0] == 0
    classifier = make_classifier(template, ["bad", "fair", "good"], calibrate=method)
    labels = [scores(classifier, f"{sentence} .").argmax().item() for sentence in SENTENCES]
    expected = [
        f"{label} ||| {text} . So it is\n" for label, text in zip(labels, SENTENCES, strict=True)
    ]
    assert (project.path / "toy-dev-advanced-output.txt").read_text() == "".join(expected)
