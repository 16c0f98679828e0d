"""Which room may import which, read from the imports themselves."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spotlighter_plugin import cli, forks

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "spotlighter_plugin"
# a room may import itself and what stands after it
ROOMS = (
    *("__main__", "cli", "workbench", "forks", "trainer", "wrapper", "pretrained", "hosts", "towers"),
    *("config", "method", "compat", "runtime", "ranks", "errors", "files"),
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Dotted names of all that a file imports, those inside functions, too; ours begin with spotlighter_plugin."""
    package, names = path.relative_to(ROOT).parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def ours(path):
    """What a file imports of ours, as parts below spotlighter_plugin."""
    return [name.split(".")[1:] for name in imported(path) if name.startswith("spotlighter_plugin.")]


def test_every_file_is_in_a_room_that_the_rules_know():
    assert {room(path) for path in MODULES} == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    allowed = ROOMS[ROOMS.index(room(path)) :]
    assert [name for name in ours(path) if name[0] not in allowed] == []


def test_the_plug_in_never_imports_the_workbench():
    above = ("__main__", "cli", "workbench")
    plug_in = [PACKAGE / "__init__.py", *(path for path in MODULES if room(path) not in above)]
    assert len(plug_in) > 30
    for path in plug_in:
        assert not [name for name in ours(path) if name[0] in ("workbench", "cli")], path
        assert not [name for name in imported(path) if name.split(".")[0] in ("trainers", "datasets", "train")], path


def test_the_method_imports_torch_alone():
    for path in (PACKAGE / "method").glob("*.py"):
        others = {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names
        assert others <= {"torch", "spotlighter_plugin"}, path
        assert all(name[0] == "method" for name in ours(path)), path


def test_hosts_never_import_each_other():
    for path in (PACKAGE / "hosts").glob("*.py"):
        assert all(name[1] == "base" for name in ours(path) if name[0] == "hosts"), path


def test_a_trainer_that_is_copied_into_a_fork_imports_hosts_and_the_mixin_alone():
    copied = list((ROOT / "trainers").glob("*_spotlighter.py"))
    assert copied
    for path in copied:
        assert {name[0] for name in ours(path)} <= {"hosts", "trainer"}, path
        assert {name.split(".")[0] for name in imported(path)} <= {"torch", "dassl", "spotlighter_plugin"}, path


def test_import_paths_that_forks_contain_go_on_working():
    paths = {"config", "trainer", "wrapper", "forks", "hosts.coop", "hosts.maple", "hosts.promptkd", "hosts.clipfit"}
    for diff in (ROOT / "patches").glob("*.diff"):
        paths |= set(re.findall(r"^\+import spotlighter_plugin\.([\w.]+)", diff.read_text(), re.M))
    for name in paths:
        importlib.import_module(f"spotlighter_plugin.{name}")


def test_what_forks_need_is_applied_in_a_forks_script_and_nowhere_else(tmp_path):
    (tmp_path / "trainers").mkdir()
    script = tmp_path / "train.py"
    script.write_text("import sys, spotlighter_plugin.forks\nprint('spotlighter_plugin.forks.today' in sys.modules)\n")

    def applied(*command):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout == "True\n"

    assert applied("train.py") and applied(str(script))
    assert not applied("-c", script.read_text())
    assert forks.is_fork(tmp_path) and not forks.is_fork(ROOT) and not forks.is_fork(tmp_path / "trainers")


@pytest.mark.parametrize(
    "arguments", ("--help", "attach --help", "attach absent", "run --help", "sweep --help", "ablate nothing", "docter")
)
def test_text_and_refusals_import_no_torch(arguments, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "spotlighter_plugin", *arguments.split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert "spotlighter_plugin.cli" in done.stderr
    assert not re.search(r"\btorch", done.stderr)


def test_help_lists_every_command_that_a_module_has():
    for name, (module, text) in cli.COMMANDS.items():
        assert importlib.import_module(f"spotlighter_plugin.{module}").app
        assert text.endswith("."), name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_say_what_they_return(path):
    def silent(node):
        for each in ast.iter_child_nodes(node):
            if isinstance(each, (ast.ClassDef, ast.FunctionDef)) and not each.name.startswith("_"):
                yield from silent(each) if isinstance(each, ast.ClassDef) else [each.name] * (each.returns is None)

    assert list(silent(ast.parse(path.read_text(encoding="utf-8")))) == []
