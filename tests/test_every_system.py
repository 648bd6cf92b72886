"""What has to hold on every system: imports, the order of the rooms, installation."""

import ast
import graphlib
import importlib.util
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

UNIX_ONLY = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix_ipc"}
RUN_ALL = """
import json, os, runpy, sys
root, folder, commands = sys.argv[1], os.getcwd(), json.loads(sys.argv[2])
sys.path.insert(0, root)
for name in {names!r}:
    sys.modules[name] = None  # its import fails
for script, *sys.argv[1:] in commands:
    sys.argv[0] = script
    os.chdir(folder if script == "run_llama.py" else root)
    runpy.run_path(os.path.join(root, script), run_name="__main__")
    print("done:", script, file=sys.stderr)
"""
LEVELS = (  # a room may import those of its own line and of the lines above
    {"common", "config", "utils"},
    {"rope", "tokenizer", "optimizer"},
    {"base_llama"},
    {"llama"},
    {"checkpoints", "inference", "kernels"},
    {"classifier"},
    {"text", "training", "evaluation"},
    {"methods"},
    {"tasks"},
    {"run_llama"},
)


def test_all_options_and_checks_run_without_the_modules_of_unix(project):
    (project.path / "text.txt").write_text("The fox saw the hen.\n<|endoftext|>\n" * 100)
    pretrain = ["--option", "pretrain", "--text", "text.txt", "--steps", "2", "--dim", "8"]
    pretrain += ["--vocab_size", "280", "--n_layers", "1", "--n_heads", "2", "--max_seq_len", "8"]
    commands = [
        ["run_llama.py", *project.flags, "--max_new_tokens", "3"],
        ["run_llama.py", *project.flags, "--option", "prompt"],
        ["run_llama.py", *project.flags, "--option", "finetune", "--metrics_out", "m.jsonl"],
        ["run_llama.py", *pretrain],
        *([script] for script in ("rope_test.py", "optimizer_test.py", "sanity_check.py")),
    ]
    code = RUN_ALL.format(names=sorted(UNIX_ONLY))
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), json.dumps(commands)],
        cwd=project.path,
        capture_output=True,
        text=True,
    )
    assert done.stderr.count("done:") == len(commands), done.stderr


def sources() -> list[Path]:
    """The modules of the root and of `minllama`."""
    return [*ROOT.glob("*.py"), *ROOT.joinpath("minllama").rglob("*.py")]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, in_functions: bool) -> Iterator[str]:
    """The modules that a file imports, without those for type checkers only."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef) and not in_functions:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def test_no_module_of_unix_is_imported_when_a_module_is():
    for path in [*sources(), *ROOT.glob("data/*.py"), *ROOT.glob("benchmarks/*.py")]:
        assert UNIX_ONLY.isdisjoint(imports(path, in_functions=False)), path


def test_imports_have_no_circles():
    """Not inside functions either, except in `llama.py`."""
    names = {module_name(path) for path in sources()}
    graph = {}
    for path in sources():
        imported = set(imports(path, in_functions=path.name != "llama.py"))
        graph[module_name(path)] = (imported & names) - {module_name(path)}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_imports_go_up_the_levels():
    levels = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
    for path in sources():
        room, *_ = module_name(path).removeprefix("minllama.").split(".")
        for name in imports(path, in_functions=room != "llama"):
            other = name.removeprefix("minllama.").split(".")[0]
            if room in levels and other in levels:
                assert levels[other] <= levels[room], f"{path} imports {name}"


def test_what_stands_alone():
    """The model is read without the package; settings and errors load without PyTorch."""
    ours = {module_name(path).split(".")[0] for path in sources()}
    llama = {name.split(".")[0] for name in imports(ROOT / "llama.py", in_functions=False)}
    assert llama & ours == {"base_llama", "config", "rope"}
    assert ours.isdisjoint(imports(ROOT / "optimizer.py", in_functions=True))
    for path in ROOT.glob("minllama/common/*.py"):
        assert "torch" not in imports(path, in_functions=True), path


def test_a_copy_is_not_installed():
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    spec = importlib.util.spec_from_file_location("backend", ROOT / ".ci/editable_only.py")
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    with pytest.raises(SystemExit, match=r"pip install -e \."):
        backend.build_wheel("folder")


def test_all_modules_are_installed():
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)["tool"]["setuptools"]
    assert set(settings["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    folders = {path.parent for path in ROOT.joinpath("minllama").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)
