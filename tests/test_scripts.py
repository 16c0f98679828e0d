"""The shell scripts make the folders that upstream's make and that `spotlighter sweep` plans."""

import os
import pathlib
import shutil
import subprocess
import sys

import fake_home
import pytest

from spotlighter_plugin.workbench.sweeps.plan import Plan
from spotlighter_plugin.workbench.training.runs import read_run

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


@pytest.fixture
def home(tmp_path):
    shutil.copytree(SCRIPTS, tmp_path / "home/scripts")
    return fake_home.make(tmp_path / "home")


def script(home, name, *arguments, check=True, **environment):
    return subprocess.run(
        ["bash", f"scripts/{name}.sh", *map(str, arguments)],
        cwd=home,
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        check=check,
    )


def folders(home):
    return {str(path.parent.relative_to(home / "output")) for path in (home / "output").rglob("log.txt")}


def planned(home, *args, **kwargs):
    runs = [run for chain in Plan(*args, output=home / "output", home=home, **kwargs).chains() for run in chain]
    assert all(run.complete and not run.contradiction() for run in runs)
    return {str(run.folder.relative_to(home / "output")) for run in runs}


@pytest.mark.parametrize("trainer", ["CoOp", "CoOpSpotlighter"])
def test_base2new_scripts_make_the_sweeps_folders(home, trainer):
    for name in ("base2new_train", "base2new_test"):
        script(home, f"{name}", "dtd", 1, TRAINER=trainer)
    assert folders(home) == planned(home, "base2new", (trainer,), ("dtd",), (1,))


def test_cross_scripts_make_the_sweeps_folders(home):
    script(home, "xd_train", 2)
    for name in ("imagenet_a", "dtd"):
        script(home, "xd_test", name, 2)
    assert folders(home) == planned(home, "crossdomain", ("CoOp",), ("imagenet_a", "dtd"), (2,))


def test_few_shot_scripts_make_the_sweeps_folders(home):
    script(home, "few_shot", "dtd", 4)
    script(home, "few_shot", "dtd", 4, "TRAINER.MODAL", "cross", TRAINER="PromptKD")
    assert folders(home) == planned(home, "fewshot", ("CoOp", "PromptKD"), ("dtd",), shots=(4,))


def test_promptkd_and_zero_shot_scripts_make_the_sweeps_folders(home):
    options = "DATASET.SUBSAMPLE_CLASSES", "all", "TRAINER.MODAL", "base2novel"
    script(home, "base2new_train", "dtd", 1, *options, TRAINER="PromptKD", SHOTS="0")
    script(home, "zeroshot", "dtd")
    both = planned(home, "base2new", ("PromptKD", "ZeroshotCLIP"), ("dtd",), (1,))
    assert folders(home) == both | planned(home, "fewshot", ("ZeroshotCLIP",), ("dtd",), (1,))


def test_promptkd_is_distilled_anew_on_each_target(home):
    script(home, "few_shot", "dtd", 0, "TRAINER.MODAL", "cross", TRAINER="PromptKD", SEEDS="1")
    assert folders(home) == planned(home, "crossdataset", ("PromptKD",), ("dtd",), (1,))


def test_a_complete_run_is_not_run_again_and_options_are_handed_on(home):
    script(home, "base2new_train", "dtd", 1, "OPTIM.LR", "0.1")
    (run,) = folders(home)
    assert read_run(home / "output" / run).settings["OPTIM.LR"] == "0.1"
    assert script(home, "base2new_train", "dtd", 1).stdout == f"complete: output/{run}\n"
    assert len(list((home / "output" / run).glob("log.txt*"))) == 1


def test_testing_before_training_is_one_line(home):
    ended = script(home, "base2new_test", "dtd", 1, check=False)
    assert ended.returncode == 1 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert "holds no checkpoint: train first" in ended.stderr
    assert script(home, "base2new_test", check=False).stderr.startswith("usage: ")


def test_every_script_is_executable_and_takes_any_trainer(home):
    assert all(os.access(path, os.X_OK) for path in SCRIPTS.rglob("*.sh") if path.name != "common.sh")
    script(home, "few_shot", "dtd", 4, TRAINER="CoOpSpotlighter")
    assert folders(home) == planned(home, "fewshot", ("CoOpSpotlighter",), ("dtd",), shots=(4,))
