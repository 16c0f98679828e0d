"""What an installation needs: files in the package, the console script, the Makefile's promises."""

import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from test_attach import miniature

ROOT = Path(__file__).resolve().parent.parent


BUNDLED = ("trainers", "datasets", "configs", "patches")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built in a copy."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("spotlighter_plugin", *BUNDLED):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", "dist"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return next((copy / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def packed(wheel):
    """What is in the wheel: {name: content}."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A call of `spotlighter` as the wheel installs it into an empty environment, far from the repository.

    Torch and its kin are borrowed from the running interpreter; nothing is downloaded.
    """
    if importlib.util.find_spec("pip") is None:
        pytest.skip("no pip here")
    place = tmp_path_factory.mktemp("installed")
    venv.create(place / "venv", with_pip=False)
    python = place / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "-q"]
    subprocess.run([*install, "--no-deps", "--no-index", wheel], check=True, timeout=120)
    packages = next((place / "venv").rglob("site-packages"))
    added = {path.name for path in packages.iterdir()}
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")

    def spotlighter(*arguments, cwd=place):
        env = {**os.environ, "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"}
        env.pop("PYTHONPATH", None)
        command = [python.with_name("spotlighter"), *arguments]
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    spotlighter.place, spotlighter.added = place, added
    return spotlighter


def test_the_wheel_carries_every_module_the_runtime_and_the_weights(packed):
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "spotlighter_plugin").rglob("*.py")} <= packed.keys()
    assert "spotlighter_plugin/runtime/dassl/engine/trainer.py" in packed
    assert any(name.endswith(".safetensors") for name in packed) and "spotlighter_plugin/py.typed" in packed


def test_the_wheel_carries_trainers_data_sets_configurations_and_patches_below_the_package(packed):
    for folder in BUNDLED:
        files = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"}
        assert files and {f"spotlighter_plugin/bundled/{path}" for path in files} <= packed.keys()


def test_the_wheel_installs_the_command_and_names_its_requirements(packed):
    info = {Path(name).name: content.decode() for name, content in packed.items() if ".dist-info/" in name}
    assert "spotlighter = spotlighter_plugin.cli:main" in info["entry_points.txt"]
    assert "Requires-Python: >=3.10" in info["METADATA"] and "setuptools<81" in info["METADATA"]
    extras = {name.replace("-", "_") for name in re.findall(r"^Provides-Extra: (.+)$", info["METADATA"], re.M)}
    assert extras == {"open_clip", "transformers", "slurm", "ray", "test"}
    for path in re.findall(r"^Project-URL: \w+, (.+)$", info["METADATA"], re.M):
        assert path.startswith("https://") or (ROOT / path).is_file(), path


def test_an_installed_package_puts_nothing_but_itself_beside_other_peoples(installed):
    assert all(name.startswith("spotlighter_plugin") for name in installed.added)


def test_an_installed_package_attaches_to_a_fork_plans_and_is_sound(installed):
    fork = miniature(installed.place / "fork", "MaPLe")
    assert "created trainers/maple_spotlighter.py" in installed("attach", str(fork))
    assert (fork / "configs/trainers/MaPLeSpotlighter/vit_b16.yaml").is_file()
    assert "nothing to do" in installed("attach", str(fork))
    planned = installed("sweep", "base2new", "--datasets", "dtd", "--seeds", "1", "--plan").splitlines()
    assert len(planned) == 4 and all("workbench.training.train --root" in line for line in planned)
    assert "missing" not in installed("doctor")


def test_an_installed_package_runs_a_forks_script_with_our_trainer(installed):
    fork = miniature(installed.place / "another", "CoOp")
    (fork / "trainers/coop.py").write_text(
        "from dassl.engine import TRAINER_REGISTRY, TrainerX\n" + (fork / "trainers/coop.py").read_text()
    )
    (fork / "train.py").write_text(
        "from dassl.engine import TRAINER_REGISTRY\nimport trainers.coop\n"
        "print(TRAINER_REGISTRY.get('CoOpSpotlighter').__bases__[1].__module__)\n"
    )
    assert installed("run", "--", "train.py", cwd=fork) == "trainers.coop\n"


def test_an_installed_package_runs_the_demo_and_says_what_it_is_doing_and_what_is_next(installed):
    said = installed("demo", "--quick")
    assert "CoOp: training" in said and "CoOp + Spotlighter │" in said
    assert len(json.loads((installed.place / "output/demo/table.json").read_text())) == 3
    *_, results, first, second = said.splitlines()
    assert "output/demo/table.json" in results and first.startswith("  spotlighter") and second.startswith("  spot")


def test_dir_shows_what_the_package_exports():
    import spotlighter_plugin

    assert {"SpotlighterConfig", "SpotlighterWrapper", "__version__"} == set(dir(spotlighter_plugin))
    assert all(getattr(spotlighter_plugin, name) for name in dir(spotlighter_plugin))


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
    assert re.search(r"-m venv.*\[test\].*-m pytest", plan("test"), re.S)
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
