"""Random flags and damaged files are refused in one line; so are wrong flags of other scripts.

`tests/bad_inputs.py` tries them by the thousand, and measures memory and time.
"""

import re
import runpy
import shutil
from pathlib import Path

import bad_inputs
import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SCRIPTS = sorted(
    f"{path.parent.name}.{path.stem}"
    for room in ("benchmarks", "experiments")
    for path in ROOT.joinpath(room).glob("*.py")
    if "run_script(main)" in path.read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, run_once):
    """A folder with model, tokenizer, data, a saved classifier and a run folder."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        bad_inputs.prepare()
    for flags in (bad_inputs.FINETUNE, bad_inputs.PRETRAIN):
        run_once(folder, *flags)
    return folder


@pytest.mark.parametrize("kind", bad_inputs.KINDS)
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(rng=st.randoms(use_true_random=False))
def test_a_bad_input_is_refused_in_one_line(prepared, tmp_path, monkeypatch, run_cli, kind, rng):
    """Or it runs. No input is changed, and no temporary file is left."""
    folder = tmp_path / "work"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    flags = bad_inputs.make_bad_input(kind, rng)
    read = {path: path.read_bytes() for path in map(Path, ("model.pt", "text.txt"))}
    threads = torch.get_num_threads()
    code, _, err = run_cli(*flags)
    torch.set_num_threads(threads)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) in ((0, 0), (2, 1)), (flags, err)
    assert all(len(line) < 2000 for line in err.splitlines())
    assert all(path.read_bytes() == content for path, content in read.items())
    assert Path(bad_inputs.SAVED).exists() and Path("run").exists()
    assert not list(Path().rglob(".*.tmp"))


WRONG_FLAGS = {
    "benchmarks.sync --rounds 0": "argument --rounds: 0: need a whole number",
    "benchmarks.training_memory --n_heads 3": "dim 512 is not a multiple of n_heads 3",
    "benchmarks.training_memory --context 0": "argument --context: 0: need a whole number",
    "experiments.demo --n_train 5000": "data/demo/reviews-train.txt has 1000 lines",
    "experiments.demo --n_train 1": "one label only",
    "experiments.written --sources empty.txt": "empty.txt: no text in it",
    "minllama.checkpoints.average absent.pt data/demo/model.pt --out x.pt": "absent.pt: no such",
    **{f"{script} --no-such-flag": "--help lists all flags" for script in SCRIPTS},
}


@pytest.mark.parametrize(("command", "error"), WRONG_FLAGS.items())
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_wrong_flags_of_a_script_are_one_line(tmp_path, monkeypatch, capsys, command, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    for name in ("empty.txt", "tokenizer.model"):
        (tmp_path / name).touch()
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as end:
        runpy.run_module(command.split()[0], run_name="__main__")
    assert end.value.code == 2
    assert re.fullmatch(rf"error: .*{error}.*\n", capsys.readouterr().err)
