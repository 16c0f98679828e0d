"""What an installation needs: files in the package, the console script, the Makefile's promises."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, as {name: content}, built in a copy."""
    copy = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "spotlighter_plugin", copy / "spotlighter_plugin", ignore=shutil.ignore_patterns("*.pyc"))
    (copy / "spotlighter_plugin" / "weights").mkdir(exist_ok=True)
    (copy / "spotlighter_plugin" / "weights" / "some.safetensors").write_bytes(b"x")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", "dist"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((copy / "dist").glob("*.whl"))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_carries_every_module_the_runtime_and_the_weights(wheel):
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "spotlighter_plugin").rglob("*.py")}
    assert modules <= wheel.keys()
    assert "spotlighter_plugin/runtime/dassl/engine/trainer.py" in wheel
    assert "spotlighter_plugin/weights/some.safetensors" in wheel


def test_the_wheel_installs_the_command_and_names_its_requirements(wheel):
    info = {Path(name).name: content.decode() for name, content in wheel.items() if ".dist-info/" in name}
    assert "spotlighter = spotlighter_plugin.cli:main" in info["entry_points.txt"]
    assert "Requires-Python: >=3.10" in info["METADATA"] and "setuptools<81" in info["METADATA"]
    assert {"test", "figures"} == set(re.findall(r"^Provides-Extra: (\w+)$", info["METADATA"], re.M))


def test_the_constraints_pin_torch_so_that_no_cuda_build_is_drawn_in():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert {"torch==2.13.0", "torchvision==0.28.0", "setuptools<81"} <= set(lines)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_installs_before_it_runs_and_not_again_afterwards(tmp_path):
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy2(ROOT / name, tmp_path)

    def plan(goal):
        done = subprocess.run(["make", "-n", goal], cwd=tmp_path, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert re.search(r"-m venv.*--no-build-isolation.*spotlighter demo", plan("demo"), re.S)
    assert re.search(r"-m venv.*\[test,figures\].*-m pytest", plan("test"), re.S)
    (tmp_path / ".venv").mkdir()
    for name in ("installed", "installed-test"):
        (tmp_path / ".venv" / name).touch()
    assert "pip" not in plan("demo") + plan("test")
    os.utime(tmp_path / "constraints.txt", (2e9, 2e9))
    assert "pip" in plan("test")


def test_ci_runs_the_tests_and_stops_at_the_first_failure():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text() and "make test" in script.read_text()


def test_the_command_line_lists_its_commands_and_refuses_an_unknown_one():
    def spotlighter(*arguments):
        command = [sys.executable, "-m", "spotlighter_plugin", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    shown = spotlighter("--help")
    assert shown.returncode == 0 and "doctor" in shown.stdout
    refused = spotlighter("docter")
    assert refused.returncode != 0 and "Traceback" not in refused.stderr


def test_doctor_says_what_is_missing_and_fails_then(monkeypatch, capsys):
    from spotlighter_plugin import cli

    monkeypatch.setattr(cli, "CHECKS", {"python": lambda: "3"})
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor"])
    assert left.value.code in (0, None)

    def absent():
        raise FileNotFoundError("no weights")

    monkeypatch.setattr(cli, "CHECKS", {"python": lambda: "3", "tiny CLIP": absent})
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor"])
    shown = capsys.readouterr()
    assert left.value.code == 1 and "no weights" in shown.out and shown.err.startswith("error: ")
