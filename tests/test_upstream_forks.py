"""The real forks on the real Dassl: one epoch and an evaluation, with the host's trainer and with ours, on a CPU."""

import importlib
import re
import sys

import pytest
import torch
from clip.model import CLIP
from fork_kit import FORKS, ROOT, UPSTREAM, execute, flags, make

pytestmark = pytest.mark.skipif(
    not (UPSTREAM / "dassl").is_dir(),
    reason="SPOTLIGHTER_UPSTREAM names no folder with checkouts of the forks and dassl",
)
sys.path.append(str(ROOT / "tools"))
REPOSITORIES = importlib.import_module("compatibility").REPOSITORIES
RUN = ("-m", "spotlighter_plugin", "run", "--", "train.py")
FEWER_TOKENS = ("TRAINER.SPOTLIGHTER.TOP_K", "8")


def accuracies(out):
    return re.findall(r"^\* accuracy: ([\d.]+)%", out, re.M)


def code(fork):
    return {path: path.read_bytes() for path in fork.rglob("*.py")}


@pytest.mark.parametrize("name", list(FORKS))
def test_the_fork_trains_and_evaluates_with_its_trainer_and_with_ours(name, tmp_path):
    fork, theirs = make(name, tmp_path), FORKS[name]
    before = code(fork)
    config = f"{theirs.host}/{theirs.config}"

    out, err, status = execute(fork, *RUN, *flags(fork, theirs.host, config))
    assert status == 0, err[-3000:]
    assert accuracies(out)

    out, err, status = execute(fork, *RUN, *flags(fork, theirs.trainer, config, *FEWER_TOKENS))
    assert status == 0, err[-3000:]
    assert re.search(r"^Spotlighter adds [\d,]+ trainable parameters", out, re.M)
    losses = [float(loss) for loss in re.findall(r" loss (\S+) \(", out)]
    assert len(losses) >= 3 and all(map(torch.isfinite, map(torch.tensor, losses)))
    assert code(fork) == before
    trained = accuracies(out)[-1]

    assert execute(fork, "-m", "spotlighter_plugin", "attach", ".")[2] == 0
    ours = f"{theirs.trainer}/vit_b16"  # the copied configuration
    load = ("--eval-only", "--model-dir", f"output/{theirs.trainer}", "--load-epoch", "1", *FEWER_TOKENS)
    out, err, status = execute(fork, "train.py", *flags(fork, theirs.trainer, ours, *load))
    assert status == 0, err[-3000:]
    assert "Loaded spotlighter from" in out
    assert accuracies(out)[-1] == trained
    assert execute(fork, "-m", "spotlighter_plugin", "attach", "--detach", ".")[2] == 0
    assert code(fork) == before


def test_a_host_without_a_vision_transformer_is_refused_in_one_line(tmp_path):
    fork = make("CoOp", tmp_path)
    weights = next(tmp_path.glob("*/ViT-B-16.pt"))
    torch.save(CLIP(64, 32, (1, 1, 1, 1), 64, None, 77, 49408, 64, 1, 2).state_dict(), tmp_path / "resnet.pt")
    source = (fork / "trainers/coop.py").read_text()
    (fork / "trainers/coop.py").write_text(source.replace("clip._download(url)", repr(str(tmp_path / "resnet.pt"))))
    assert weights.is_file()
    out, err, status = execute(fork, *RUN, *flags(fork, "CoOpSpotlighter", "CoOp/vit_b16", *FEWER_TOKENS))
    assert status == 1
    assert err.splitlines()[-1].startswith("error: the image encoder is a ModifiedResNet, not a vision transformer")
    assert "Traceback" not in err


def test_a_missing_teacher_is_refused_in_one_line(tmp_path):
    fork = make("PromptKD", tmp_path)
    next(fork.glob("teacher_model/*/*/model-best.pth.tar")).unlink()
    config = "PromptKD/vit_b16_c2_ep20_batch8_4+4ctx"
    out, err, status = execute(fork, *RUN, *flags(fork, "PromptKDSpotlighter", config, *FEWER_TOKENS))
    assert status == 1
    assert "teacher_model" in err.splitlines()[-1] and "Traceback" not in err


def test_run_refuses_a_script_that_is_not_there_in_one_line(tmp_path):
    out, err, status = execute(tmp_path, *RUN[:-1], "absent.py")
    assert status == 1 and "no such file" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("name", list(REPOSITORIES))
def test_a_public_repository_is_attached_trained_evaluated_on_new_classes_and_left_as_it_was(name, tmp_path):
    repository = REPOSITORIES[name]
    if not (UPSTREAM / repository.folder).is_dir():
        pytest.skip("no checkout")
    row = sys.modules["compatibility"].try_repository(repository, tmp_path)
    assert row["recognised"] == row["detached"] == "yes"
    assert all("\n" not in cell for cell in row.values())
    if row["trained"].startswith("not done within"):
        pytest.skip(row["trained"])
    if row["attached"] == "yes":  # refused in one line elsewhere
        assert float(row["invariance error"]) < 1e-5
        assert row["trained"] == row["new classes"] == "yes"
