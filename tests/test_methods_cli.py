"""The methods' flags on the command line: that they act, what is saved, what is refused."""

import os
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import SENTENCES, make_llama, save_llama

import finetune
import methods
from base_llama import read_checkpoint
from calibration import Calibrated
from classifier import LlamaZeroShotClassifier
from evaluation import model_eval
from lora import LoRALinear

METHOD_FLAGS = [
    ["--tune", "lora", "--lora_rank", "2", "--lora_alpha", "4", "--lora_dropout", "0.1"],
    ["--tune", "adapter", "--adapter_size", "3"],
    ["--tune", "prefix", "--prefix_length", "3"],
    ["--tune", "norm", "--wise_ft", "0", "0.5", "1"],
    ["--tune", "head", "--pooling", "mean"],
    ["--prompt_based", "--shots", "2", "--prompt_template", "{sentence} So it is"],
    ["--prompt_based", "--tune", "lora", "--smart", "1", "--smart_steps", "2"],
    ["--mixout", "0.5", "--smart", "1", "--wise_ft", "0.5", "1", "--activation_checkpointing"],
    ["--lr_schedule", "cosine", "--warmup", "0.5", "--layer_decay", "0.7", "--pooling", "last"],
]


def saved_file(project):
    """What fine-tuning saved, the only one there."""
    (path,) = project.path.glob("finetune-*.pt")
    return path.name


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
@pytest.mark.parametrize("flags", METHOD_FLAGS)
def test_what_a_method_saved_loads_and_predicts_the_same(project, run_cli, flags, causal):
    flags = [*project.flags, "--option", "finetune", causal, "--lr", "1e-3", *flags]
    code, out, err = run_cli(*flags)
    assert code == 0, err
    assert re.search(r"train [\d,]+ of [\d,]+ parameters", out) and "peak memory" in out
    outputs = [project.path / f"toy-{split}-advanced-output.txt" for split in ("dev", "test")]
    predictions = [path.read_text() for path in outputs]
    for path in outputs:
        path.unlink()
    names = ["toy-dev-advanced-output.txt", "toy-test-advanced-output.txt"]
    load = ["--load", saved_file(project), "--dev_out", names[0], "--test_out", names[1]]
    code, again, _ = run_cli("--option", "finetune", *project.flags, *load)
    assert code == 0
    assert "train loss" not in again and "save the model" not in again
    assert [path.read_text() for path in outputs] == predictions
    assert out[out.index("dev acc ::", out.index("load model")) :].strip() in again


def test_a_saved_adapter_is_small_and_needs_its_base(project, run_cli):
    flags = [*project.flags, "--option", "finetune", "--tune", "lora"]
    assert run_cli(*flags, "--lr", "1e-3")[0] == 0
    saved = read_checkpoint(project.path / "finetune-1-0.001-tune-lora.pt")
    assert all("lora_" in name or "classifier_head" in name for name in saved["model"])
    (project.path / "model.pt").rename(project.path / "base.pt")
    load = ["--option", "finetune", "--load", saved_file(project)]
    code, _, err = run_cli(*load, *project.flags, "--pretrained-model-path", "base.pt")
    assert code == 0, err


@pytest.fixture
def saved_run(project, run_cli):
    """A trained LoRA, and the flags that load it."""
    flags = ["--option", "finetune", *project.flags]
    assert run_cli(*flags, "--tune", "lora", "--max_sentence_len", "9")[0] == 0
    return ["--option", "finetune", "--load", saved_file(project)]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--max_sentence_len", "8"], "trained with max_sentence_len 9"),
        (["--causal"], "trained with causal False"),
        (["--tune", "adapter"], "trained with tune lora"),
        (["--lora_rank", "4"], "trained with lora_rank 8"),
        (["--grad_accum", "2"], "--grad_accum"),
        (["--label-names", "two.json"], "two.json"),
        (["--pretrained-model-path", "other.pt"], "trained on other weights than other.pt"),
        (["--dev", "more-labels.txt"], "more-labels.txt"),
    ],
)
def test_a_saved_run_takes_no_other_settings(project, run_cli, saved_run, flags, named):
    save_llama(make_llama(seed=1), project.path / "other.pt")
    (project.path / "more-labels.txt").write_text("7 ||| a film\n")
    (project.path / "two.json").write_text('["bad", "good"]')
    code, _, err = run_cli(*saved_run, *flags)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err
    same = ["--max_sentence_len", "9", "--tune", "lora", "--no-causal"]
    assert run_cli(*saved_run, *same)[0] == 0


def test_a_saved_run_reports_under_the_labels_names(project, run_cli):
    flags = [flag for flag in project.flags if "label" not in flag]  # the names are not needed
    assert run_cli("--option", "finetune", *flags)[0] == 0
    load = ["--option", "finetune", "--load", saved_file(project), "--report"]
    mapping = str(project.path / "data/toy-label-mapping.json")
    code, out, err = run_cli(*load, "--label-names", mapping)
    assert code == 0, err
    assert "fair" in out and "fair" not in run_cli(*load)[1]


def test_flags_that_an_older_saved_run_does_not_know_are_off(project, run_cli):
    assert run_cli("--option", "finetune", *project.flags)[0] == 0
    path = project.path / saved_file(project)
    saved = read_checkpoint(path)
    for part in ("args", "model_config"):
        saved[part] = {n: v for n, v in saved[part].items() if n not in methods.defaults()}
    torch.save(saved, path)
    load = ["--option", "finetune", "--load", path.name]
    assert run_cli(*load)[0] == 0
    code, _, err = run_cli(*load, "--pooling", "mean")
    assert code == 2 and "trained with pooling None" in err


def test_a_saved_run_is_evaluated_as_it_was_trained(project, run_cli, monkeypatch):
    flags = ["--option", "finetune", *project.flags, "--causal", "--dtype", "bfloat16"]
    assert run_cli(*flags, "--batch_size", "3", "--max_sentence_len", "7")[0] == 0
    seen = []
    monkeypatch.setattr(finetune, "report_results", lambda args, *_: seen.append(args))
    assert run_cli("--option", "finetune", "--load", saved_file(project))[0] == 0
    (args,) = seen
    assert (args.dtype, args.batch_size, args.max_sentence_len) == ("bfloat16", 3, 7)
    assert args.dev == "data/toy-dev.txt" and args.causal is True


def test_rows_that_a_saved_run_cuts_are_counted(project, run_cli, saved_run):
    (project.path / "long-dev.txt").write_text("1 ||| " + "a film " * 200 + "\n")
    path = project.path / saved_run[-1]
    saved = read_checkpoint(path)
    saved["args"]["max_sentence_len"] = None
    torch.save(saved, path)
    code, _, err = run_cli(*saved_run, "--dev", "long-dev.txt")
    assert code == 0 and "1 of 7 rows do not fit the context" in err


def test_a_saved_run_from_own_weights_keeps_its_advanced_names(project, run_cli):
    names = ["--dev_out", "x-dev-advanced-output.txt", "--test_out", "x-test-advanced-output.txt"]
    assert run_cli("--option", "finetune", *project.flags, *names)[0] == 0
    assert run_cli("--option", "finetune", "--load", saved_file(project), *names)[0] == 0


def test_a_saved_run_with_values_that_are_no_numbers_is_named(project, run_cli, saved_run):
    path = project.path / saved_run[-1]
    saved = read_checkpoint(path)
    saved["model"]["classifier_head.bias"][0] = float("nan")
    torch.save(saved, path)
    code, _, err = run_cli(*saved_run)
    assert code == 2 and "classifier_head.bias has values that are not finite" in err


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model_config", "num_labels", "3"),
        ("model_config", "num_labels", 0),
        ("model_config", "hidden_dropout_prob", None),
        ("model_config", "causal", 3),
        ("model_config", "lora_rank", "8"),
        ("args", "dev", 5),
        ("args", "batch_size", "4"),
    ],
)
def test_a_setting_of_another_type_is_one_line(project, run_cli, saved_run, part, name, value):
    path = project.path / saved_run[-1]
    saved = read_checkpoint(path)
    torch.save(saved | {part: saved[part] | {name: value}}, path)
    code, _, err = run_cli(*saved_run)
    assert code == 2 and "not what --option finetune saves" in err and err.count("\n") == 1


@pytest.mark.parametrize("part", ["model", "args", "model_config"])
def test_a_malformed_saved_run_is_one_line(project, run_cli, saved_run, part):
    path = project.path / saved_run[-1]
    saved = read_checkpoint(path)
    for broken in ({}, [1], None):
        torch.save(saved | {part: broken}, path)
        code, _, err = run_cli(*saved_run)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (broken, err)


BAD_METHODS = [
    (["--mixout", "0.5", "--tune", "lora"], "--mixout"),
    (["--mixout", "1"], "--mixout"),
    (["--wise_ft", "0.5", "--tune", "prefix"], "--wise_ft"),
    (["--wise_ft", "1.5"], "--wise_ft"),
    (["--layer_decay", "0.5", "--tune", "head"], "--layer_decay"),
    (["--tune", "head", "--prompt_based"], "nothing to train"),
    (["--shots", "5"], "label 0 has 4 sentences"),
    (["--prompt_based", "--prompt_template", "no place"], "--prompt_template"),
    (["--prompt_based", "--label-names", "absent.json"], "absent.json"),
    (["--tune", "prefix", "--prefix_length", "128"], "--prefix_length"),
    (["--load", "absent.pt"], "absent.pt"),
    (["--load", "model.pt"], "not what --option finetune saves"),
    (["--prompt_based", "--causal", "--activation_checkpointing"], "--activation_checkpointing"),
    (["--option", "prompt", "--calibrate", "pmi"], "--calibrate"),
    (["--option", "prompt", "--prompt_template", "x"], "--prompt_template"),
    (["--prompt_based", "--pooling", "mean"], "--pooling"),
]
IDLE_FLAGS = [
    (["--lora_rank", "4"], "--lora_rank acts only with --tune lora"),
    (["--tune", "lora", "--adapter_size", "4"], "--adapter_size acts only with --tune adapter"),
    (["--prefix_length", "4"], "--prefix_length acts only with --tune prefix"),
    (["--smart_mu", "1"], "--smart_mu acts only with --smart"),
    (["--calibrate", "pmi"], "--calibrate acts only with --option prompt"),
    (["--prompt_template", "{sentence}"], "acts only with --option prompt or --prompt_based"),
    (["--option", "prompt", "--mixout", "0.5"], "--mixout acts only with --option finetune"),
    (["--option", "prompt", "--load", "x.pt"], "--load acts only with --option finetune"),
    (["--option", "generate", "--tune", "lora"], "--tune acts only with --option finetune"),
    (["--option", "generate", "--report"], "--report acts only with --option prompt or finetune"),
    (["--option", "pretrain", "--pooling", "mean"], "--pooling acts only with --option finetune"),
    (["--dropout", "0.1"], "--dropout acts only with --option pretrain"),
]


@pytest.mark.parametrize(("flags", "named"), BAD_METHODS + IDLE_FLAGS)
def test_methods_that_do_not_go_together_are_one_line(project, run_cli, flags, named):
    before = sorted(os.listdir(project.path))
    code, _, err = run_cli("--option", "finetune", *project.flags, *flags)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err
    assert sorted(os.listdir(project.path)) == before


def test_advanced_names_are_for_advanced_methods(project, run_cli):
    names = ["--dev_out", "x-dev-advanced-output.txt", "--test_out", "x-test-advanced-output.txt"]
    for args in ({"given": []}, {"given": [], "mixout": 0.5}, {"given": ["pretrained_model_path"]}):
        args = SimpleNamespace(**(methods.defaults() | {"load": None} | args))
        advanced = args.mixout > 0 or bool(args.given)
        assert ("advanced" in methods.out_file_kinds(args, "finetuning")) == advanced
    assert run_cli("--option", "finetune", *project.flags, "--mixout", "0.1", *names)[0] == 0
    assert (project.path / "x-test-advanced-output.txt").exists()


@pytest.mark.parametrize("method", ["contextual", "pmi"])
def test_calibrated_predictions_are_those_of_scoring_one_by_one(
    project, run_cli, tokenizer, method
):
    template = "{sentence} So it is"
    flags = ["--option", "prompt", "--causal", "--prompt_template", template, *project.flags]
    assert run_cli(*flags)[0] == 0
    output = project.path / "toy-dev-advanced-output.txt"
    plain = output.read_text().splitlines()
    assert run_cli(*flags, "--calibrate", method)[0] == 0
    names = ["bad", "fair", "good"]
    config = SimpleNamespace(pretrained_model_path="model.pt", num_labels=3, causal=True)
    model = LlamaZeroShotClassifier(config, tokenizer, names)
    calibrated = Calibrated(model, method, template, names, tokenizer)
    expected = {model: [], calibrated: []}
    for sentence in SENTENCES:
        ids = tokenizer.encode(f"{sentence} .", bos=True, eos=False)
        ids = torch.tensor([ids + tokenizer.encode("So it is", bos=False, eos=False)])
        for scorer, lines in expected.items():
            label = scorer(ids, torch.tensor([ids.shape[1]])).argmax().item()
            lines.append(f"{label} ||| {sentence} . So it is")
    assert plain == expected[model] != expected[calibrated]
    assert output.read_text().splitlines() == expected[calibrated]


@pytest.fixture
def fake_dev(monkeypatch):
    """Lets training see given accuracies on dev, one after the other, and then the real ones."""

    def fake(*accuracies):
        left = list(accuracies)

        def evaluate(loader, *args):
            accuracy, *rest = model_eval(loader, *args)
            is_dev = len(loader.dataset) == 6
            return (left.pop(0) if is_dev and left else accuracy, *rest)

        monkeypatch.setattr(finetune, "model_eval", evaluate)

    return fake


def test_wise_ft_mixes_the_start_and_the_best_epoch_by_dev(project, run_cli, fake_dev, monkeypatch):
    fake_dev(0.3, 0.6, 0.4, 0.5, 0.7, 0.2)
    saved = []
    save = finetune.save_model

    def recorded(model, *args):
        saved.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        save(model, *args)

    monkeypatch.setattr(finetune, "save_model", recorded)
    flags = ["--option", "finetune", *project.flags, "--epochs", "3", "--lr", "1e-3"]
    code, out, _ = run_cli(*flags, "--causal", "--wise_ft", "0", "0.4", "1")
    assert code == 0
    curve = re.findall(r"alpha (\S+): dev acc :: (\S+)", out)
    assert curve == [("0", "0.500"), ("0.4", "0.700"), ("1", "0.200")]
    assert "keep alpha 0.4" in out
    _, best, kept = saved  # of epochs 0 and 1, and at the end
    start = read_checkpoint("model.pt")["model"]
    for name, tensor in read_checkpoint(saved_file(project))["model"].items():
        assert torch.equal(tensor, kept[name])
        if name.startswith("llama."):
            mixed = 0.6 * start[name.removeprefix("llama.")] + 0.4 * best[name]
            assert torch.allclose(tensor, mixed, atol=1e-6), name
            assert not torch.equal(tensor, best[name]), name


def test_patience_counts_from_the_best_epoch(project, run_cli, fake_dev):
    fake_dev(0.3, 0.3, 0.5, 0.4, 0.5, 0.4, 0.4)
    flags = ["--option", "finetune", *project.flags, "--epochs", "9", "--patience", "2"]
    code, out, _ = run_cli(*flags)
    assert code == 0
    assert "epoch 4:" in out and "epoch 5:" not in out
    assert "stop: dev has not become better for 2 epochs" in out


@pytest.fixture
def trained(project, run_cli, monkeypatch):
    """What the loop gets from flags: its arguments, as `finetune.train_epoch` names them."""
    calls = []
    train_epoch = finetune.train_epoch

    def recorded(model, loader, optimizer, loss, epoch, grad_accum, after_step):
        calls.append(
            SimpleNamespace(
                model=model,
                batch=next(iter(loader)),
                groups=optimizer.param_groups,
                rates=[group["lr"] for group in optimizer.param_groups],
                loss=loss,
                after_step=after_step,
            )
        )
        return train_epoch(model, loader, optimizer, loss, epoch, grad_accum, after_step)

    monkeypatch.setattr(finetune, "train_epoch", recorded)

    def run(*flags):
        calls.clear()
        code, _, err = run_cli("--option", "finetune", *project.flags, "--lr", "1e-3", *flags)
        assert code == 0, err
        return calls[0]

    return run


def test_schedules_reach_the_loop(trained):
    call = trained("--lr_schedule", "linear", "--warmup", "0.5", "--grad_accum", "2")
    assert call.rates == pytest.approx([5e-4])  # on the way up, in the first of two steps
    assert call.groups[0]["lr"] == 0  # 3 batches were 2 steps, and 2 were expected
    call = trained("--layer_decay", "0.5")
    assert call.rates == pytest.approx([1e-3 / 8, 1e-3 / 4, 1e-3 / 2, 1e-3])


def test_sizes_reach_the_adapters(trained):
    flags = ["--lora_rank", "2", "--lora_alpha", "5", "--lora_dropout", "0.25"]
    model = trained("--tune", "lora", *flags).model
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    assert {(layer.scale, layer.dropout.p, len(layer.lora_a)) for layer in layers} == {
        (2.5, 0.25, 2)
    }
    model = trained("--tune", "adapter", "--adapter_size", "3").model
    assert model.llama.layers[0].attention.adapter.down.weight.shape == (3, 32)
    model = trained("--tune", "prefix", "--prefix_length", "5").model
    assert model.llama.layers[1].attention.prefix_key.shape[1] == 5


def test_unmasked_rows_are_pooled_by_their_lengths(trained):
    assert "lengths" in trained("--no-causal", "--pooling", "mean").batch
    assert "lengths" not in trained("--no-causal").batch


def test_smarts_average_follows_where_it_is_used(trained):
    call = trained("--smart", "1")
    assert call.after_step == [call.loss.update_average] and call.loss.average
    call = trained("--smart", "1", "--smart_mu", "0")
    assert call.after_step == [] and not call.loss.average


def test_shots_are_drawn_with_the_seed_and_prompts_with_the_template(
    project, trained, run_cli, monkeypatch
):
    seen = []
    few_shot = finetune.few_shot
    monkeypatch.setattr(
        finetune, "few_shot", lambda *args: seen.append(args[1:]) or few_shot(*args)
    )
    flags = ["--shots", "2", "--seed", "7", "--prompt_based"]
    call = trained(*flags, "--prompt_template", "{sentence} So it is")
    assert seen == [(2, 3, 7)]
    assert len(call.batch["sents"]) == 4
    assert all(sentence.endswith(". So it is") for sentence in call.batch["sents"])


def test_long_or_odd_settings_become_a_digest_in_the_files_name():
    def suffix(**flags):
        return methods.file_suffix(SimpleNamespace(**(methods.defaults() | flags)))

    assert suffix() == ""
    assert suffix(tune="lora", smart=1.0) == "-tune-lora-smart-1.0"
    names = {suffix(prompt_based=True, prompt_template="{sentence} " + "x" * n) for n in (8, 9)}
    assert len(names) == 2
    assert all(re.fullmatch(r"-methods-[0-9a-f]{8}", name) for name in names)


def test_settings_from_code_need_not_be_of_the_very_type(project):
    """As other people's scripts call it: whole numbers for rates."""
    data = {split: f"data/toy-{split}.txt" for split in ("train", "dev", "test")}
    args = SimpleNamespace(
        **data,
        label_names="data/toy-label-mapping.json",
        pretrained_model_path="model.pt",
        max_sentence_len=None,
        seed=1,
        epochs=1,
        option="finetune",
        use_gpu=False,
        dev_out="x-dev-advanced-output.txt",
        test_out="x-test-advanced-output.txt",
        batch_size=4,
        hidden_dropout_prob=0,
        lr=1e-3,
        filepath="m.pt",
        mixout=0,
        smart=1,
    )
    finetune.train(args)
    finetune.test(args)
    assert (project.path / "x-dev-advanced-output.txt").exists()
