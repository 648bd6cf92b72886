"""What must hold on every system: imports, arrows between the rooms, installation."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

UNIX_ONLY = ["fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix_ipc"]
BLOCKED = """
import runpy, sys
for name in {names!r}:
    sys.modules[name] = None  # an import of it fails
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
sys.path.insert(0, {root!r})
runpy.run_path(script, run_name="__main__")
"""

ROOT_MODULES = {
    *("run_llama", "llama", "base_llama", "config", "rope", "tokenizer", "classifier"),
    *("optimizer", "utils", "sanity_check", "rope_test", "optimizer_test", "prepare_submit"),
}
ROOMS = ("common", "checkpoints", "inference", "text", "training", "methods", "tasks")
LEVELS = [  # what is further down may import what is above it
    {"common"},
    {"config", "utils"},
    {"rope", "tokenizer", "optimizer"},
    {"base_llama"},
    {"checkpoints", "inference"},
    {"llama"},
    {"classifier"},
    {"text", "training"},
    {"methods"},
    {"tasks"},
    {"run_llama"},
]


def run_without_unix(script: str, *flags: str, cwd: Path) -> subprocess.CompletedProcess:
    code = BLOCKED.format(names=UNIX_ONLY, root=str(ROOT))
    command = [sys.executable, "-c", code, str(ROOT / script), *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize(
    "flags",
    [
        ["--max_new_tokens", "3"],
        ["--option", "prompt"],
        ["--option", "finetune", "--metrics_out", "m.jsonl"],
        [
            *("--option", "pretrain", "--text", "text.txt", "--steps", "2", "--vocab_size", "280"),
            *("--dim", "8", "--n_layers", "1", "--n_heads", "2", "--max_seq_len", "8"),
        ],
    ],
    ids=lambda flags: flags[1],
)
def test_each_option_runs_without_unixs_modules(project, flags):
    (project.path / "text.txt").write_text("The fox saw the hen.\n<|endoftext|>\n" * 100)
    data = [] if "pretrain" in flags else project.flags
    done = run_without_unix("run_llama.py", *data, *flags, cwd=project.path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["rope_test.py", "optimizer_test.py", "sanity_check.py"])
def test_the_checks_run_without_unixs_modules(script):
    done = run_without_unix(script, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def imports_of(path: Path, *, everywhere: bool) -> set[str]:
    """The first parts of the names of what a file imports.

    Args:
        everywhere: in functions too, else where the file is imported; never what is imported for
            the checker of types only.
    """
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.FunctionDef) and not everywhere:
                continue
            if isinstance(child, ast.Import):
                names.update(alias.name.split(".")[0] for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                names.add(child.module.split(".")[0])
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def sources() -> list[Path]:
    folders = [*ROOMS, "data", "benchmarks", "experiments"]
    return [*ROOT.glob("*.py"), *(path for name in folders for path in (ROOT / name).rglob("*.py"))]


def test_nothing_of_unix_is_imported_when_a_module_is():
    for path in sources():
        assert not imports_of(path, everywhere=False) & set(UNIX_ONLY), path


def test_the_root_holds_the_assignments_files_and_no_other_module():
    assert {path.stem for path in ROOT.glob("*.py")} == ROOT_MODULES
    for room in ROOMS:
        rule = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
        assert rule, room


def test_arrows_go_down():
    levels = {name: level for level, names in enumerate(LEVELS) for name in names}
    for path in sources():
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in levels:
            continue  # an entry point, or above all levels
        for name in imports_of(path, everywhere=True) & levels.keys():
            below = levels[name] < levels[parts[0]]
            assert below or name == parts[0], f"{path} imports {name}"
    assert not imports_of(ROOT / "optimizer.py", everywhere=True) & levels.keys()


def test_a_copy_is_not_installed(capsys):
    spec = importlib.util.spec_from_file_location("backend", ROOT / ".ci/editable_only.py")
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not here")
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    with pytest.raises(SystemExit, match=r"pip install -e \."):
        backend.build_wheel("folder")


def test_all_modules_are_installed():
    """Those that `pip install -e .` makes importable are all that there are."""
    import tomllib

    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)["tool"]["setuptools"]
    assert set(settings["py-modules"]) == ROOT_MODULES
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(settings["packages"]) == packages - {"tests"}
    assert not os.path.exists(ROOT / "setup.py")
