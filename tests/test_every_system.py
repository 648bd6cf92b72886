"""What has to hold on every system: imports, the order of the rooms, installation."""

import ast
import graphlib
import importlib.util
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

CAPTURED = {"capture_output": True, "text": True, "check": True}
UNIX_ONLY = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix_ipc"}
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


def test_every_system_checks_out_the_same_bytes(tmp_path):
    """Git for Windows turns line ends into CRLF unless `.gitattributes` forbids it."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git")
    git = ["git", "-c", "core.autocrlf=true", "-c", "advice.detachedHead=false"]
    subprocess.run([*git, "clone", "-q", "--no-tags", ROOT, tmp_path / "clone"], check=True)
    listed = subprocess.run([*git, "-C", tmp_path / "clone", "ls-files", "--eol"], **CAPTURED)
    assert "setup.sh" in listed.stdout
    changed = [line for line in listed.stdout.splitlines() if "w/crlf" in line or "w/mixed" in line]
    assert not changed
