"""compat.py: what must import does, each fix acts once, and an installed Dassl works."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spotlighter_plugin import compat

ROOT = Path(__file__).resolve().parent.parent
UPSTREAM = Path(os.environ.get("SPOTLIGHTER_UPSTREAM", "/nonexistent"))


def python(code):
    """Run `code` in a fresh interpreter from the repository's root; returns what it printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_clip_torchvision_and_dassl_import_after_the_plugin():
    out = python("import spotlighter_plugin, clip, torchvision, dassl.engine; print(dassl.__name__, clip.__name__)")
    assert out == "dassl clip"


def test_a_mere_folder_called_dassl_does_not_hide_ours(tmp_path):
    (tmp_path / "dassl").mkdir()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import spotlighter_plugin, dassl; print(dassl.__file__)"
    assert python(code).endswith("runtime/dassl/__init__.py")


def test_importing_twice_changes_nothing():
    init, paths, held = torch.optim.lr_scheduler.LRScheduler.__init__, list(sys.path), list(compat._libraries)
    compat.apply()
    assert torch.optim.lr_scheduler.LRScheduler.__init__ is init
    assert sys.path == paths and compat._libraries == held
    assert sys.path.count(str(compat.RUNTIME)) == (0 if compat.real_dassl() else 1)


def test_torchvisions_operators_are_declared_only_where_they_cannot_load():
    import torchvision

    assert hasattr(torch.ops.torchvision, "nms")
    assert torchvision.extension._has_ops() != bool(compat._libraries)


def test_an_installed_dassl_imports_without_what_prompt_tuning_never_calls(tmp_path):
    (tmp_path / "dassl").mkdir()
    (tmp_path / "dassl" / "__init__.py").write_text("__version__ = 'real'\n")
    (tmp_path / "dassl" / "engine.py").write_text(
        "import gdown\nimport pandas as pd\nfrom tabulate import tabulate\n"
        "from torch.utils.tensorboard import SummaryWriter\nfrom wilds import get_dataset\n"
    )
    out = python(
        "import importlib.util, sys; from spotlighter_plugin import compat\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "for name in [name for name in sys.modules if name.split('.')[0] == 'dassl']: del sys.modules[name]\n"
        "importlib.invalidate_caches(); assert compat.real_dassl()\n"
        "compat.import_dassl_without_unused.__wrapped__()\n"
        "from dassl.engine import SummaryWriter, tabulate; SummaryWriter('x').add_scalar('a', 1, 2)\n"
        "assert 'wilds' not in sys.modules or importlib.util.find_spec('wilds') is not None\n"
        "print(tabulate([['a', 1]]))"
    )
    assert "a" in out and "1" in out


def test_what_a_stub_stands_for_cannot_be_called():
    loader = compat._Refusing("wilds").get_dataset
    with pytest.raises(ImportError, match="wilds.get_dataset was called"):
        loader("fmow")


def test_a_scheduler_that_passes_verbose_works(monkeypatch):
    scheduler = torch.optim.lr_scheduler.LRScheduler
    monkeypatch.setattr(scheduler, "__init__", scheduler.__init__)  # given back after the test
    compat.accept_verbose_in_lr_schedulers.__wrapped__()

    class Halving(scheduler):
        def __init__(self, optimizer, last_epoch=-1, verbose=False):
            super().__init__(optimizer, last_epoch, verbose)

        def get_lr(self):
            return [rate * 0.5**self.last_epoch for rate in self.base_lrs]

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = Halving(optimizer)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_fix_that_ran_does_not_run_again():
    calls = []
    fix = compat.once(lambda: calls.append(1))
    fix()
    fix()
    assert calls == [1]


@pytest.mark.skipif(not compat.real_dassl(), reason="needs the real Dassl")
def test_a_checkpoint_that_the_real_dassl_wrote_loads(tmp_path):
    from dassl import utils
    from dassl.optim.lr_scheduler import ConstantWarmupScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    schedule = ConstantWarmupScheduler(optimizer, successor, 1, 1e-5)
    as_upstream = {key: value for key, value in vars(schedule).items() if key != "optimizer"}
    state = {"state_dict": {"ctx": torch.ones(2)}, "epoch": 3, "scheduler": as_upstream, "val_result": None}
    torch.save(state, tmp_path / "model.pth.tar-3")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "model.pth.tar-3", weights_only=True)
    assert utils.load_checkpoint(str(tmp_path / "model.pth.tar-3"))["state_dict"]["ctx"].tolist() == [1, 1]


@pytest.mark.skipif(
    compat.real_dassl() or not (UPSTREAM / "dassl").is_dir(), reason="SPOTLIGHTER_UPSTREAM holds no dassl checkout"
)
def test_train_py_and_the_runtime_pass_their_tests_on_the_real_dassl():
    env = {**os.environ, "PYTHONPATH": str(UPSTREAM / "dassl")}
    paths = [f"tests/test_{name}.py" for name in ("train_run", "faults", "dassl_runtime", "compat")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
