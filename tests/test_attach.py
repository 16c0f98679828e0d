"""`spotlighter attach`: into a fork and out again, and nothing half done where it cannot be.

The forks here are miniatures in upstream's layout; SPOTLIGHTER_UPSTREAM adds the real ones.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fork_kit import FORKS, UPSTREAM

from spotlighter_plugin.forks import attach
from spotlighter_plugin.forks.attach import ROOT

MODULES = {"CoOp": "coop", "MaPLe": "maple", "PromptKD": "promptkd", "CLIPFit": "ClipFit"}
TRAIN = """import torch

from dassl.config import get_cfg_default
from dassl.engine import build_trainer

import datasets.one

import trainers.{first}
import trainers.zeroshot


def setup_cfg(args):
    cfg = get_cfg_default()
    extend_cfg(cfg)
    return cfg
"""


def miniature(folder, host, newline="\n"):
    """A fork in upstream's layout: train.py and one trainer."""
    (folder / "trainers").mkdir(parents=True)
    (folder / "configs/trainers").mkdir(parents=True)
    module, registered = MODULES[host], {"CLIPFit": "ClipFit"}.get(host, host)
    trainer = f"@TRAINER_REGISTRY.register()\nclass {registered}(TrainerX):\n    pass\n"
    (folder / f"trainers/{module}.py").write_text(trainer)
    (folder / "train.py").write_bytes(TRAIN.format(first=module).replace("\n", newline).encode())
    return folder


@pytest.fixture(params=list(FORKS))
def fork(request, tmp_path):
    """The real fork where there is a checkout, a miniature elsewhere; the host's name and a copy of it."""
    checkout = UPSTREAM / FORKS[request.param].folder
    if not checkout.is_dir():
        return request.param, miniature(tmp_path / "fork", request.param)
    few = shutil.ignore_patterns(
        "clip", "datasets", "docs", "images", "interpret*", "lpclip", "scripts", "Dassl*", ".git"
    )
    return request.param, Path(shutil.copytree(checkout, tmp_path / "fork", ignore=few))


def contents(folder):
    """Every file's bytes and permissions, and every folder, by path."""
    return {p: (p.read_bytes(), p.stat().st_mode) if p.is_file() else None for p in sorted(folder.rglob("*"))}


def run(capsys, folder, **options):
    capsys.readouterr()
    attach.command(folder, **{"trainer": None, "dry_run": False, "detach": False, **options})
    return capsys.readouterr().out


@contextlib.contextmanager
def refused_and_untouched(folder, message, kind=ValueError):
    before = contents(folder)
    with pytest.raises(kind, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


def test_attaching_copies_trainer_and_config_and_adds_only_its_own_lines(fork, capsys):
    host, folder = fork
    before = contents(folder)
    said = run(capsys, folder)
    after = contents(folder)
    copied = [
        folder / f"trainers/{host.lower()}_spotlighter.py",
        folder / f"configs/trainers/{host}Spotlighter/vit_b16.yaml",
    ]
    assert {path for path in after if path.is_file()} - before.keys() == set(copied)
    for path in copied:
        assert path.read_bytes() == (ROOT / path.relative_to(folder)).read_bytes()
        assert str(path.relative_to(folder)) in said
    assert f"python train.py --root DATA --trainer {host}Spotlighter" in said
    added = [line for line in (folder / "train.py").read_text().splitlines() if "spotlighter" in line]
    assert [line.split("  #")[0].strip() for line in added] == [
        "import spotlighter_plugin.config",
        "import spotlighter_plugin.forks",
        f"import trainers.{host.lower()}_spotlighter",
        "spotlighter_plugin.config.extend_cfg(cfg)",
    ]
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {folder / "train.py"}


def test_the_added_lines_stand_where_they_work(fork, capsys):
    host, folder = fork
    run(capsys, folder)
    lines = (folder / "train.py").read_text().splitlines()
    assert lines.index("import spotlighter_plugin.config") < min(
        i for i, x in enumerate(lines) if x.startswith("from dassl")
    )
    last = max(i for i, line in enumerate(lines) if line.startswith("import trainers."))
    assert lines[last] == f"import trainers.{host.lower()}_spotlighter"
    assert lines[lines.index("    spotlighter_plugin.config.extend_cfg(cfg)") - 1] == "    extend_cfg(cfg)"


def test_detaching_restores_every_byte_and_permission(fork, capsys):
    _, folder = fork
    os.chmod(folder / "train.py", 0o751)
    before = contents(folder)
    run(capsys, folder)
    assert contents(folder) != before
    run(capsys, folder, detach=True)
    assert contents(folder) == before
    assert "nothing to do: not attached" in run(capsys, folder, detach=True)


def test_windows_line_ends_and_foreign_bytes_survive(tmp_path, capsys):
    folder = miniature(tmp_path / "fork", "CoOp", "\r\n")
    script = folder / "train.py"
    script.write_bytes(
        script.read_bytes().replace(b"import torch", b"import torch  # \xe9t\xe9".replace(b"\xe9", b"\xc3\xa9"))
    )
    before = contents(folder)
    run(capsys, folder)
    assert script.read_bytes().count(b"\r\n") == script.read_bytes().count(b"\n")
    run(capsys, folder, detach=True)
    assert contents(folder) == before


def test_a_second_attach_changes_nothing(fork, capsys):
    _, folder = fork
    run(capsys, folder)
    before = contents(folder)
    assert "nothing to do: attached already" in run(capsys, folder)
    assert contents(folder) == before


def test_a_dry_run_says_everything_and_changes_nothing(fork, capsys):
    host, folder = fork
    before = contents(folder)
    said = run(capsys, folder, dry_run=True)
    assert contents(folder) == before
    assert "dry run: nothing was changed" in said and f"+ import trainers.{host.lower()}_spotlighter" in said


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_diff_alone_does_to_upstream_what_attach_does(fork, capsys):
    host, folder = fork
    if not UPSTREAM.is_dir():
        pytest.skip("SPOTLIGHTER_UPSTREAM names no folder with checkouts: line numbers are upstream's")
    script = folder / "train.py"
    before = script.read_bytes()
    run(capsys, folder)
    attached = script.read_bytes()
    script.write_bytes(before)
    diff = str(ROOT / f"patches/{host.lower()}.diff")
    subprocess.run(["git", "apply", "--unidiff-zero", diff], cwd=folder, check=True)
    assert script.read_bytes() == attached


@pytest.mark.parametrize("host", list(FORKS))
def test_the_diffs_hold_no_line_of_upstreams(host):
    for line in (ROOT / f"patches/{host.lower()}.diff").read_text().splitlines():
        assert line.startswith(("---", "+++", "@@")) or (line.startswith("+") and "spotlighter" in line)


def test_a_fork_that_was_edited_elsewhere_is_attached_all_the_same(tmp_path, capsys):
    folder = miniature(tmp_path / "fork", "MaPLe")
    script = folder / "train.py"
    script.write_text("# mine\nimport os\n" + script.read_text() + "\nprint('more')\n")
    before = contents(folder)
    run(capsys, folder)
    compile(script.read_text(), "train.py", "exec")
    run(capsys, folder, detach=True)
    assert contents(folder) == before


@pytest.mark.parametrize("gone", ["from dassl", "import trainers.zeroshot", "    extend_cfg(cfg)\n"])
def test_a_fork_that_differs_is_left_alone_and_told_the_lines_to_add(tmp_path, gone):
    folder = miniature(tmp_path / "fork", "CoOp")
    script = folder / "train.py"
    text = script.read_text()
    if gone == "import trainers.zeroshot":  # imported where no line can follow
        text = text.replace(gone, "from trainers import (\n    zeroshot,\n)")
    script.write_text(text.replace("from dassl", "from .dassl") if gone == "from dassl" else text.replace(gone, ""))
    with refused_and_untouched(folder, "differs from upstream's and is left as it is. Add by hand: .*extend_cfg"):
        attach.command(folder, None)


def test_a_fork_patched_by_hand_is_left_alone(tmp_path):
    folder = miniature(tmp_path / "fork", "CoOp")
    script = folder / "train.py"
    script.write_text(script.read_text() + "import trainers.my_spotlighter\n")
    with refused_and_untouched(folder, r"train.py:16 was patched by hand \(import trainers.my_spotlighter\)"):
        attach.command(folder, None)


def test_a_trainer_of_that_name_that_is_not_ours_is_left_alone(tmp_path, capsys):
    folder = miniature(tmp_path / "fork", "CoOp")
    (folder / "trainers/coop_spotlighter.py").write_text("# mine\n")
    with refused_and_untouched(folder, "coop_spotlighter.py is there already and is not Spotlighter's"):
        attach.command(folder, None)
    assert "left as it is" in run(capsys, folder, detach=True)
    assert (folder / "trainers/coop_spotlighter.py").read_text() == "# mine\n"


def test_what_is_no_fork_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        attach.command(tmp_path / "absent", None)
    with refused_and_untouched(tmp_path, "is no fork of CoOp or of its descendants: it has no train.py; a library"):
        attach.command(tmp_path, None)
    folder = miniature(tmp_path / "outer" / "fork", "CoOp")
    with refused_and_untouched(tmp_path, "did you mean .*fork"):
        attach.command(tmp_path / "outer", None)
    (folder / "trainers/coop.py").write_text("class VPT:\n    pass\n")
    with refused_and_untouched(tmp_path, "is no fork of .*: its train.py imports no trainer .*your_own_host.md"):
        attach.command(folder, None)
    with pytest.raises(ValueError, match="is Spotlighter itself"):
        attach.command(ROOT, None)


def descendant(folder, *names, package="trainers"):
    """A miniature fork with further trainers, one a module, all imported by train.py."""
    folder = miniature(folder, "CoOp")
    (folder / package).mkdir(exist_ok=True)
    for name in names:
        code = f"@TRAINER_REGISTRY.register()\nclass {name}(TrainerX):\n    pass\n"
        (folder / package / f"{name.lower()}.py").write_text(code)
    script, lines = folder / "train.py", "".join(f"import {package}.{name.lower()}\n" for name in names)
    script.write_text(script.read_text().replace("import trainers.zeroshot\n", f"import trainers.zeroshot\n{lines}"))
    return folder


def test_a_trainer_that_nobody_foresaw_is_named_and_gets_a_file_of_its_own(tmp_path, capsys):
    folder = descendant(tmp_path / "fork", "KgCoOp", "ProGrad")
    before = contents(folder)
    assert "also there: KgCoOp, ProGrad (--trainer NAME)" in run(capsys, folder, dry_run=True)
    said = run(capsys, folder, trainer="KgCoOp")
    assert "KgCoOp is trained by its own step (trainers.kgcoop)" in said and "--trainer KgCoOpSpotlighter" in said
    written = (folder / "trainers/kgcoop_spotlighter.py").read_text()
    assert 'class KgCoOpSpotlighter(SpotlighterAttachedMixin, TRAINER_REGISTRY.get("KgCoOp")):' in written
    assert "import trainers.kgcoop  # noqa" in written
    lines = (folder / "train.py").read_text().splitlines()
    assert lines[lines.index("import trainers.prograd") + 1] == "import trainers.kgcoop_spotlighter"
    run(capsys, folder, trainer="prograd")
    assert "nothing to do: attached already" in run(capsys, folder, trainer="KgCoOpSpotlighter")
    run(capsys, folder)
    assert (folder / "train.py").read_text().count("import spotlighter_plugin.forks") == 1
    assert len(list(folder.glob("trainers/*_spotlighter.py"))) == 3
    run(capsys, folder, detach=True)
    assert contents(folder) == before


def test_trainers_in_a_folder_of_another_name_are_found_there(tmp_path, capsys):
    folder = descendant(tmp_path / "fork", "LASP", package="prompting")
    shutil.rmtree(folder / "trainers")
    script = folder / "train.py"
    script.write_text(script.read_text().replace("import trainers.coop\nimport trainers.zeroshot\n", ""))
    run(capsys, folder)
    lines = script.read_text().splitlines()
    assert lines[lines.index("import prompting.lasp") + 1] == "import prompting.lasp_spotlighter"
    assert (folder / "prompting/lasp_spotlighter.py").is_file()


def test_a_trainer_that_train_py_forgot_to_import_is_found_when_it_is_named_and_detached_again(tmp_path, capsys):
    folder = descendant(tmp_path / "fork", "HPT")
    script = folder / "train.py"
    script.write_text(script.read_text().replace("import trainers.hpt\n", ""))
    before = contents(folder)
    assert "HPT" not in run(capsys, folder, dry_run=True)
    assert "HPT is trained by its own step (trainers.hpt)" in run(capsys, folder, trainer="HPT")
    assert "import trainers.hpt  # noqa" in (folder / "trainers/hpt_spotlighter.py").read_text()
    run(capsys, folder, detach=True)
    assert contents(folder) == before


def test_which_of_several_unknown_trainers_is_meant_has_to_be_said(tmp_path, capsys):
    folder = descendant(tmp_path / "fork", "KgCoOp", "ProGrad")
    (folder / "trainers/coop.py").unlink()
    with refused_and_untouched(folder, "has the trainers KgCoOp, ProGrad: say which with --trainer"):
        attach.command(folder, None)
    run(capsys, folder, trainer="ProGrad")
    run(capsys, folder, detach=True)
    assert not list(folder.glob("*/*_spotlighter.py"))
    with refused_and_untouched(folder, "has no trainer MMRL: take --trainer with one of KgCoOp, ProGrad"):
        attach.command(folder, trainer="MMRL")


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("step", range(3))
def test_a_failure_on_the_way_leaves_the_fork_as_it_was(tmp_path, monkeypatch, capsys, step, detach):
    folder = miniature(tmp_path / "fork", "CoOp")
    if detach:
        run(capsys, folder)
    before = contents(folder)
    left = [step]

    def failing(original):
        def act(path, *args, **kwargs):
            left[0] -= 1
            if left[0] == -1:
                raise PermissionError(13, "Permission denied", str(path))
            return original(path, *args, **kwargs)

        return act

    monkeypatch.setattr(os, "replace", failing(os.replace))
    monkeypatch.setattr(Path, "unlink", failing(Path.unlink) if detach else Path.unlink)
    with pytest.raises(PermissionError, match="Permission denied; nothing was changed"):
        attach.command(folder, None, detach=detach)
    assert contents(folder) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_fork_is_refused_in_one_line(tmp_path):
    folder = miniature(tmp_path / "fork", "CoOp")
    places = [folder, folder / "trainers", folder / "configs/trainers"]
    for place in places:
        place.chmod(0o555)
    with refused_and_untouched(folder, "Permission denied; nothing was changed", PermissionError):
        attach.command(folder, None)
    for place in places:
        place.chmod(0o755)


SCRIPT = """import torch
from dassl.config import get_cfg_default
import trainers.coop


def extend_cfg(cfg):
    cfg.TRAINER.COOP = True


def setup_cfg():
    cfg = get_cfg_default()
    extend_cfg(cfg)
    return cfg


if __name__ == "__main__":
    import report

    report.report(setup_cfg())
"""
REPORT = """import sys

import torch
from dassl.engine import TRAINER_REGISTRY


def report(cfg):
    bases = [base.__name__ for base in TRAINER_REGISTRY.get("CoOpSpotlighter").__bases__]
    print(sys.argv, bases, cfg.TRAINER.SPOTLIGHTER.PRESET, torch.ones(1).cuda().to("cuda:0").half().device)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, .cuda() means it")
def test_run_and_attach_give_the_fork_our_trainer_and_its_options_on_a_cpu(tmp_path, capsys):
    folder = miniature(tmp_path / "fork", "CoOp")
    (folder / "train.py").write_text(SCRIPT)
    (folder / "report.py").write_text(REPORT)
    trainer = folder / "trainers/coop.py"
    trainer.write_text("from dassl.engine import TRAINER_REGISTRY, TrainerX\n" + trainer.read_text())
    before = contents(folder)
    expected = "['train.py', '--seed', '1'] ['SpotlighterTrainerMixin', 'CoOp'] default cpu\n"

    def out(*command):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-B", *command, "train.py", "--seed", "1"]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert out("-m", "spotlighter_plugin.forks.run") == expected
    assert contents(folder) == before
    run(capsys, folder)
    assert out() == expected
