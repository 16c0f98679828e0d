"""What docs/reliability.md promises of files, checkpoints, numbers and folders; each row of its table names a test."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import dassl_kit
import fake_home
import miniatures
import pytest
import torch
from dassl_kit import Linear, draw_squares, squares_args, train_squares, weights
from PIL import Image
from torch import nn

from datasets import common
from datasets.benchmarks import DATASET_REGISTRY
from spotlighter_plugin import cli, files
from spotlighter_plugin.method import memory
from spotlighter_plugin.runtime.dassl import evaluation, utils
from spotlighter_plugin.runtime.dassl.engine import checkpoints
from spotlighter_plugin.runtime.dassl.utils import checkpoint
from spotlighter_plugin.workbench.training.train import main

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("DescribableTextures", "EuroSAT")


@pytest.fixture
def root(tmp_path):
    draw_squares(tmp_path)
    return tmp_path


@pytest.fixture
def mistake(root, capsys):
    """A run that must fail with exit code 1 and one line; returns that line."""

    def fail(*options, out="out"):
        code = main(squares_args(root, root / out, *options))
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert code == 1 and len(lines) == 1 and "Traceback" not in error
        return lines[0]

    return fail


def epochs_in(folder):
    return checkpoints.saved_epochs(folder)


def stopped_in_epoch(monkeypatch, epoch, root, out, *options):
    """A run that dies in an epoch, as by a kill: no message of it is waited for."""
    with monkeypatch.context() as patched:
        patched.setattr(Linear, "before_epoch", lambda self: _stop_at(self, epoch))
        with pytest.raises(InterruptedError):
            train_squares(root, root / out, *options)


def _stop_at(trainer, epoch):
    if trainer.epoch + 1 == epoch:
        raise InterruptedError


# -- A: a wrong answer without a word --------------------------------------------------------------------------


class Prompts(nn.Module):
    """A learner as hosts have it: a context, and tokens of its class names as buffers."""

    def __init__(self, tokens, per_class=False):
        super().__init__()
        self.ctx = nn.Parameter(torch.zeros(3, 2, 4) if per_class else torch.zeros(2, 4))
        self.register_buffer("token_prefix", torch.full((3, 1, 4), float(tokens)))
        self.register_buffer("token_suffix", torch.full((3, 5, 4), float(tokens)))


@pytest.mark.parametrize("way", ["resume", "warm start", "evaluation"])
def test_another_runs_class_tokens_are_never_loaded(way, tmp_path):
    theirs, ours = Prompts(1.0), Prompts(2.0)
    nn.init.ones_(theirs.ctx)
    utils.save_checkpoint({"state_dict": theirs.state_dict(), "epoch": 1}, str(tmp_path))
    path = str(tmp_path / "model.pth.tar-1")
    if way == "resume":
        utils.resume_from_checkpoint(str(tmp_path), ours)
    elif way == "warm start":
        utils.load_pretrained_weights(ours, path)
    else:
        checkpoint.load_weights(ours, utils.load_checkpoint(path)["state_dict"], path)
    assert ours.ctx.eq(1).all() and ours.token_prefix.eq(2).all() and ours.token_suffix.eq(2).all()


def test_a_context_for_each_class_of_other_class_names_is_refused():
    theirs, ours, same = (Prompts(tokens, per_class=True) for tokens in (1.0, 2.0, 1.0))
    with pytest.raises(ValueError, match="of other class names"):
        checkpoint.load_weights(ours, theirs.state_dict(), "x")
    checkpoint.load_weights(same, theirs.state_dict(), "x")


def test_a_run_on_other_class_names_is_not_gone_on_with(root, mistake, monkeypatch):
    stopped_in_epoch(monkeypatch, 3, root, "out")
    for folder in ("squares", "validation"):
        (root / folder / "green").rename(root / folder / "lime")
    monkeypatch.setattr(dassl_kit, "CLASSES", ("red", "lime", "blue"))
    assert "other classes: 'green' where this one has 'lime'" in mistake("--resume", str(root / "out"))


def test_weights_that_are_not_numbers_are_never_saved(root, mistake, monkeypatch):
    update = Linear.update_lr

    def spoil(self, names=None):
        update(self, names)
        if self.epoch + 1 == self.max_epoch:
            nn.init.constant_(self.model[2].weight, float("nan"))

    monkeypatch.setattr(Linear, "update_lr", spoil)
    line = mistake()
    assert "2.weight holds nan or inf: epoch 4 is not saved" in line and "epoch 3 is kept" in line
    assert max(epochs_in(root / "out" / "linear")) == 3
    assert "accuracy" not in (root / "out" / "log.txt").read_text()


def test_a_checkpoint_of_numbers_that_are_none_is_not_evaluated(root, mistake):
    train_squares(root, root / "out")
    path = root / "out" / "linear" / "model.pth.tar-4"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["2.bias"][1] = float("nan")
    torch.save(content, path)
    evaluate = ("--eval-only", "--model-dir", str(root / "out"), "--load-epoch", "4")
    assert "2.bias holds nan or inf" in mistake(*evaluate, out="test")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_are_no_accuracy(bad):
    from dassl.config import get_cfg_default

    evaluator = evaluation.Classification(get_cfg_default())
    logits = torch.eye(3)
    evaluator.process(logits.masked_fill(torch.eye(3) == 0, -torch.inf), torch.arange(3))  # classes ruled out
    logits[1, 2] = bad
    with pytest.raises(FloatingPointError, match="logits hold nan or inf"):
        evaluator.process(logits, torch.arange(3))


@pytest.mark.parametrize("validation", ["none", "test images"])
def test_the_best_epoch_is_never_chosen_on_test_images(root, mistake, monkeypatch, validation):
    if validation == "none":
        for path in (root / "validation").glob("*/*.png"):
            path.unlink()
    else:
        monkeypatch.setattr(dassl_kit.Squares, "lends_test", True)
    assert "chosen on what it is tested on" in mistake("TEST.FINAL_MODEL", "best_val")
    assert not (root / "out" / "linear").exists()


def test_two_runs_in_one_folder_the_second_is_told(root, mistake):
    with files.alone_in(_made(root / "out")):
        files._held.clear()  # as in another process
        line = mistake()
    assert f"{root / 'out'} is in use by another run (process {os.getpid()})" in line and "--output-dir" in line
    assert not (root / "out" / "config.yaml").exists()
    train_squares(root, root / "out")


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_lock_ends_with_its_process_and_a_child_goes_on_holding_it(tmp_path):
    holder = (
        "import sys, time; from spotlighter_plugin.files import alone_in\n"
        "with alone_in(sys.argv[1]): print(1, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", holder, tmp_path], stdout=subprocess.PIPE, cwd=ROOT)
    child.stdout.readline()
    with pytest.raises(BlockingIOError), files.alone_in(tmp_path):
        pass
    child.kill()
    child.wait()
    with files.alone_in(tmp_path) as held:
        under = {**os.environ, **files.lock_of(tmp_path), "PYTHONPATH": str(ROOT)}
        inner = holder.replace("time.sleep(60)", "0")
        subprocess.run([sys.executable, "-c", inner, tmp_path], env=under, pass_fds=held, check=True, cwd=ROOT)


def test_evaluating_without_saying_what_is_refused(mistake):
    assert "needs --model-dir" in mistake("--eval-only")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("OPTIM.LR", "1e400"), "OPTIM.LR is inf"),
        (("OPTIM.LR", "1e39"), "OPTIM.LR is 1e+39"),
        (("OPTIM.WEIGHT_DECAY", "1e999"), "OPTIM.WEIGHT_DECAY is inf"),
        (("OPTIM.LR", "-1"), "OPTIM.LR is -1.0, must be at least 0"),
        (("OPTIM.MAX_EPOCH", "9223372036854775808"), "OPTIM.MAX_EPOCH is 9223372036854775808"),
        (("DATASET.NUM_SHOTS", "99999999999999999999"), "DATASET.NUM_SHOTS is 99999999999999999999"),
        (("--seed", "18446744073709551616"), "SEED is 18446744073709551616"),
        (("SEED", "4294967296"), "SEED is 4294967296"),
        (("DATALOADER.NUM_WORKERS", "1000000"), "NUM_WORKERS is 1000000, must be at most 1024"),
        (("INPUT.SIZE", "(0, 16)"), "INPUT.SIZE is (0, 16)"),
        (("INPUT.SIZE", "(16,)"), "INPUT.SIZE is (16,)"),
        (("INPUT.PIXEL_STD", "[1.0, 0.0, 1.0]"), "INPUT.PIXEL_STD"),
        (("INPUT.PIXEL_MEAN", "['a', 0, 0]"), "INPUT.PIXEL_MEAN"),
        (("INPUT.TRANSFORMS", "(1, 2)"), "INPUT.TRANSFORMS"),
        (("OPTIM.STEPSIZE", "('a',)", "OPTIM.LR_SCHEDULER", "single_step"), "OPTIM.STEPSIZE"),
        (("OPTIM.LR.X", "1"), "OPTIM.LR.X"),
        (("OPTIM", "1"), "OPTIM"),
        (("TRAINER.SPOTLIGHTER.LOSSES", "1"), "TRAINER.SPOTLIGHTER.LOSSES"),
        (("TRAINER.SPOTLIGHTER.LAMBDA2", "1e999"), "LAMBDA2"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_limit(mistake, options, said):
    assert said in mistake(*options)


def textures(folder):
    miniatures.dtd(folder)
    return folder / "dtd" / "images"


def write_split(folder, **changed):
    """A split file of the miniature textures with the first training row changed."""
    images = textures(folder)
    rows = [[f"{path.parent.name}/{path.name}", i, path.parent.name]
            for i, name in enumerate(sorted(miniatures.DTD)) for path in sorted((images / name).iterdir())]  # fmt: skip
    split = {"train": rows[::2], "val": rows[1::4], "test": rows[3::4]}
    split["train"][0] = [*split["train"][0]]
    for place, value in changed.items():
        split["train"][0][{"path": 0, "label": 1, "name": 2}[place]] = value
    path = folder / "dtd" / "split_zhou_DescribableTextures.json"
    path.write_text(json.dumps(split))
    return path


def load(folder, name="DescribableTextures"):
    return DATASET_REGISTRY.get(name)(miniatures.config(folder))


@pytest.mark.parametrize(
    "changed",
    [
        {"label": 2.7},
        {"label": -1},
        {"label": True},
        {"label": "0"},
        {"label": 2**70},
        {"name": None},
        {"name": 7},
        {"name": " "},
        {"name": "other"},
        {"path": None},
        {"path": ["a"]},
        {"path": ""},
        {"path": "a\0b"},
        {"path": "\ud800"},
    ],
    ids=str,
)
def test_a_row_of_a_split_that_cannot_be_is_named(changed, tmp_path):
    path = write_split(tmp_path, **changed)
    with pytest.raises(ValueError, match="split_zhou_DescribableTextures.json") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_two_classes_may_have_one_name_but_no_class_two(tmp_path):
    rows = [common.Row("a.jpg", 0, "crane"), common.Row("b.jpg", 1, "crane")]
    assert common.one_name_a_label(rows, "x") == rows
    with pytest.raises(ValueError, match="label 0 is both 'crane' and 'bird'"):
        common.one_name_a_label([*rows, common.Row("c.jpg", 0, "bird")], "x")


def test_a_class_that_is_tested_and_never_taught_is_one_line(tmp_path):
    path = write_split(tmp_path)
    split = json.loads(path.read_text())
    split["val"][0][1] = 99
    path.write_text(json.dumps(split))
    with pytest.raises(ValueError, match="json: class .* has no training image with its label 99"):
        load(tmp_path)


def test_a_split_nested_too_deep_is_one_line(tmp_path):
    path = write_split(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is damaged"):
        load(tmp_path)


def test_a_split_with_backslashes_and_a_split_in_utf_8_are_read_in_any_locale(tmp_path):
    images = textures(tmp_path)
    (images / "banded").rename(images / "gebändert")
    rows = [[f"{folder.name}\\{path.name}", i, folder.name]
            for i, folder in enumerate(sorted(images.iterdir())) for path in sorted(folder.iterdir())]  # fmt: skip
    split = json.dumps({"train": rows, "val": rows[::3], "test": rows[::2]}, ensure_ascii=False)
    (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").write_bytes(b"\xef\xbb\xbf" + split.encode())
    code = (
        "import sys; sys.path.insert(0, 'tests'); import spotlighter_plugin, pathlib; from test_faults import load\n"
        "data = load(pathlib.Path(sys.argv[1])); print('found', len(data.train_x), ascii(data.classnames[-1]))"
    )
    env = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code, tmp_path], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"found {len(rows)} {ascii(rows[-1][2])}" in done.stdout


@pytest.mark.parametrize("build", ["DescribableTextures", "ImageNet", "ImageNetA"])
def test_only_pictures_in_class_folders_are_images(build, tmp_path):
    miniatures.BUILDERS[build](tmp_path)
    pictures = {path for path in tmp_path.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")}
    for folder in {path.parent for path in pictures}:
        (folder / "Thumbs.db").write_bytes(b"\xd0\xcf")
        (folder / "notes.txt").write_text("all by hand")
        (folder / "old.jpg").mkdir()
        (folder.parent / "index.html").write_text("")
    data = load(tmp_path, build)
    items = [*data.train_x, *(data.val or ()), *data.test]
    assert {Path(item.impath) for item in items} == pictures
    if build == "DescribableTextures":
        assert "Thumbs" not in (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").read_text()


def test_rows_of_an_older_split_that_name_no_picture_are_left_out_with_a_count(tmp_path, capsys):
    write_split(tmp_path, path="banded/Thumbs.db")
    assert all(item.impath.endswith(".jpg") for item in load(tmp_path).train_x)
    assert "Left out 1 rows" in capsys.readouterr().out


# -- B: work lost ----------------------------------------------------------------------------------------------

ROLLING = ("TRAIN.CHECKPOINT_FREQ", "0")


def test_by_default_the_two_newest_epochs_are_kept_and_at_most_one_is_lost(root, monkeypatch):
    whole = train_squares(root, root / "whole", *ROLLING)
    assert epochs_in(root / "whole" / "linear") == {3, 4}
    stopped_in_epoch(monkeypatch, 4, root, "killed", *ROLLING)
    assert epochs_in(root / "killed" / "linear") == {2, 3}
    resumed = train_squares(root, root / "killed", *ROLLING)
    assert resumed.trainer.start_epoch == 3
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_each_n_th_checkpoint_stays_where_it_is_asked_for(root):
    train_squares(root, root / "out", "OPTIM.MAX_EPOCH", "7", "TRAIN.CHECKPOINT_FREQ", "3")
    assert epochs_in(root / "out" / "linear") == {3, 6, 7}


def test_a_run_killed_before_its_first_checkpoint_starts_over_and_says_so(root, monkeypatch, capsys):
    whole = train_squares(root, root / "whole")
    stopped_in_epoch(monkeypatch, 1, root, "killed")
    resumed = train_squares(root, root / "killed", "--resume", str(root / "killed"))
    assert "the run starts over" in capsys.readouterr().out
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    _made(root / "empty")
    train_squares(root, root / "empty", "--resume", str(root / "empty"))


DAMAGES = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "of zeros": lambda whole: b"\0" * len(whole),
    "text": lambda whole: b"no checkpoint",
    "turned bits": lambda whole: bytes(255 - byte for byte in whole),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(root, monkeypatch, capsys, damage):
    whole = train_squares(root, root / "whole", *ROLLING)
    stopped_in_epoch(monkeypatch, 4, root, "killed", *ROLLING)
    newest = root / "killed" / "linear" / "model.pth.tar-3"
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    capsys.readouterr()
    resumed = train_squares(root, root / "killed", *ROLLING)
    assert f"Left out: {newest}" in capsys.readouterr().out and resumed.trainer.start_epoch == 2
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("OPTIM.LR", "0.02"), "OPTIM.LR 0.01, this one has 0.02"),
        (("DATASET.SUBSAMPLE_CLASSES", "base"), "DATASET.SUBSAMPLE_CLASSES all, this one has base"),
        (("--backbone", "tiny"), "MODEL.BACKBONE.NAME ViT-B/16, this one has tiny"),
        (("--trainer", "LinearXU"), "TRAINER.NAME Linear, this one has LinearXU"),
        (("--seed", "2"), "SEED 1, this one has 2"),
    ],
)
@pytest.mark.parametrize("noted", [True, False], ids=["config.yaml", "checkpoint alone"])
def test_a_run_of_other_settings_is_refused_by_name(root, mistake, monkeypatch, options, said, noted):
    if not noted and "LinearXU" in options:
        pytest.skip("another trainer has other models: config.yaml alone tells")
    stopped_in_epoch(monkeypatch, 3, root, "out")
    if not noted:
        (root / "out" / "config.yaml").unlink()
    assert said in mistake("--resume", str(root / "out"), *options)
    assert epochs_in(root / "out" / "linear") == {1, 2}


def test_force_goes_on_with_other_rates_and_lengths_but_never_with_another_model(root, mistake, monkeypatch, capsys):
    stopped_in_epoch(monkeypatch, 3, root, "out")
    forced = ("--force", "OPTIM.LR", "0.02", "OPTIM.MAX_EPOCH", "6")
    done = train_squares(root, root / "out", *forced)
    assert "Goes on with OPTIM.LR 0.02, which was 0.01 (--force)" in capsys.readouterr().out
    assert done.trainer.start_epoch == 2 and epochs_in(root / "out" / "linear") >= {6}
    fresh = train_squares(root, root / "fresh", *forced[1:])
    rates = [[g["lr"] for g in each.trainer.optim.param_groups] for each in (done, fresh)]
    assert rates[0] == pytest.approx(rates[1])
    stopped_in_epoch(monkeypatch, 3, root, "b")
    assert "MODEL.BACKBONE.NAME" in mistake("--force", "--backbone", "tiny", out="b")


def test_a_checkpoint_of_another_optimizer_is_one_line(root, mistake, monkeypatch):
    stopped_in_epoch(monkeypatch, 3, root, "out")
    path = root / "out" / "linear" / "model.pth.tar-2"
    content = torch.load(path, weights_only=True)
    content["optimizer"] = {"state": {}, "param_groups": []}
    torch.save(content, path)
    assert f"{path} holds the state of another optimizer" in mistake()


def test_a_picture_that_cannot_be_read_is_counted_and_named(root, monkeypatch):
    folder = root / "squares" / "red"
    Image.new("1", (15000, 14000)).save(folder / "0.png")  # 210 megapixels
    Image.new("RGB", (9, 9)).save(folder / "1.bmp")
    bmp = bytearray((folder / "1.bmp").read_bytes())
    bmp[14:18] = b"\xff\xff\xff\x7f"
    (folder / "1.png").write_bytes(bmp)
    (folder / "1.bmp").unlink()
    Image.new("RGB", (1, 20000)).save(folder / "2.png")
    train_squares(root, root / "out")
    log = (root / "out" / "log.txt").read_text()
    assert "Skipped 3 of 24 images" in log and all(f"{folder}/{n}.png is no readable picture" in log for n in range(3))
    assert "* total: 21\n" in log


def full_disk(monkeypatch):
    """From here on nothing can be written through `write_aside`."""

    def fail(path, mode="r", *args, **kwargs):
        full = str(path).endswith(".tmp")
        return open("/dev/full" if full else path, mode, *args, **kwargs)

    monkeypatch.setattr(files, "open", fail, raising=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_with_path_and_option_and_leaves_nothing_half_written(root, mistake, monkeypatch):
    stopped_in_epoch(monkeypatch, 3, root, "out")
    before = {path: path.read_bytes() for path in (root / "out" / "linear").iterdir()}
    monkeypatch.setattr(Linear, "before_epoch", lambda self: full_disk(monkeypatch))
    line = mistake()
    assert f"cannot write {root / 'out' / 'linear' / 'model.pth.tar-3'} (No space left on device)" in line
    assert "--output-dir" in line
    assert {path: path.read_bytes() for path in (root / "out" / "linear").iterdir()} == before


def test_torchs_own_words_for_a_full_disk_become_the_same_line(tmp_path):
    def write(file):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file")

    with pytest.raises(OSError, match="No space left"):
        files.write_aside(tmp_path / "x", write)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_names_its_path():
    log = utils.Logger("/dev/full")
    log.write("x")
    with pytest.raises(OSError, match="cannot write /dev/full .No space left on device"):
        log.flush()
    with pytest.raises(OSError, match="cannot write /dev/full"):
        log.close()


def test_what_dead_processes_left_half_written_is_swept_at_the_next_start(root):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = _made(root / "out" / "linear")
    old = [folder / f"model.pth.tar-9.{dead.pid}.tmp", root / "out" / f"config.yaml.{dead.pid}.tmp"]
    living = folder / f"model.pth.tar-9.{os.getppid()}.tmp"
    mine = root / "out" / "notes.tmp"
    for path in (*old, living, mine):
        path.write_bytes(b"half")
    train_squares(root, root / "out", "--no-train")
    assert not any(path.exists() for path in old) and living.exists() and mine.exists()


def test_what_a_kill_left_half_written_goes_when_that_file_is_written_again_or_drawn_beside(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    answers, others = tmp_path / "answers.csv", tmp_path / "others.csv"
    left, kept = (Path(files.aside_of(path).replace(str(os.getpid()), str(dead.pid))) for path in (answers, others))
    living = Path(files.aside_of(answers).replace(str(os.getpid()), str(os.getppid())))
    elsewhere = left.with_name(left.name.replace(files.MACHINE, "elsewhere"))
    for path in (left, kept, living, elsewhere):
        path.write_bytes(b"half")
    files.write_aside(answers, lambda file: file.write(b"whole"))
    assert answers.read_bytes() == b"whole" and not left.exists()
    assert kept.exists() and living.exists() and elsewhere.exists()  # another's, and perhaps at work
    files.sweep_leftovers(tmp_path)
    assert not kept.exists() and living.exists() and elsewhere.exists()
    os.utime(elsewhere, (0, 0))
    files.sweep_leftovers(tmp_path)
    assert not elsewhere.exists()


def test_kills_at_any_moment_lose_no_ended_epoch_change_nothing_and_leave_nothing():
    tool = ROOT / "tools" / "soak.py"
    command = [sys.executable, tool, "kill", "--kills", "6", "--only", "checkpointing,drawing,predict"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    row = re.search(r"│ all +│(.*)│", done.stdout)[1]
    kills, half_written, continued, _, lost, differ, left = map(int, row.split("│"))
    assert kills == 6 and continued >= 6 and half_written <= kills
    assert (lost, differ, left) == (0, 0, 0)


def test_each_continued_run_has_a_log_of_its_own_whose_lines_outlive_a_kill(tmp_path, monkeypatch):
    console, read = sys.stdout, []
    for number in range(3):  # within a second
        utils.setup_logger(str(tmp_path / "log.txt"))
        print(f"run {number}")
        read.append(Path(sys.stdout.file.name).read_text())  # before it is closed
        sys.stdout.close()
        monkeypatch.setattr(sys, "stdout", console)
    assert read == [f"run {number}\n" for number in range(3)] and len(list(tmp_path.iterdir())) == 3


def test_an_output_folder_deleted_in_mid_run_is_one_line(root, mistake, monkeypatch):
    import shutil

    monkeypatch.setattr(Linear, "before_epoch", lambda self: shutil.rmtree(root / "out") if self.epoch == 2 else None)
    assert f"{root / 'out'} was deleted or moved" in mistake()
    assert not (root / "out").exists()


# -- C: tracebacks, hangs, wrong advice ------------------------------------------------------------------------


def save(content, folder):
    path = folder / "model.pth.tar-7"
    torch.save(content, path)
    return str(path)


def test_a_bare_state_dict_and_one_of_parallel_training_are_taken(tmp_path):
    for content in ({"w": torch.ones(2)}, {"module.w": torch.ones(2)}, {"state_dict": {"module.w": torch.ones(2)}}):
        loaded = utils.load_checkpoint(save(content, tmp_path))
        assert list(loaded["state_dict"]) == ["w"] and loaded["epoch"] == 7


@pytest.mark.parametrize(
    "content",
    [[1, 2], {}, {"state_dict": None}, {"state_dict": {"w": 3}}, {"state_dict": {1: torch.ones(1)}},
     torch.ones(3), "text", None, {"epoch": 3}, {"state_dict": [torch.ones(1)]}],
    ids=str,
)  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_one_line(content, tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint: it holds no state_dict") as caught:
        utils.load_checkpoint(save(content, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_asks_for_terabytes_is_one_line(tmp_path):
    huge = b"\x80\x04" + b"\x8e" + (2**45).to_bytes(8, "little") + b"x."  # BINBYTES8
    place = b"\x80\x02]r\xff\xff\xff\x7f."  # LONG_BINPUT 2^31-1
    array = b"\x80\x05" + b"\x96" + (2**28).to_bytes(8, "little") + b"x."  # BYTEARRAY8
    for number, content in enumerate((huge, place, array)):
        path = tmp_path / f"{number}"
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ValueError, match=f"{path} is no"):
            utils.load_checkpoint(str(path))
        with pytest.raises(ValueError, match=f"{path} is not a cache"):
            common.read_pickled(str(path), str(tmp_path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**24


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("name", ["x.py", "x.yaml", "x.pyc", "x"])
def test_a_config_file_is_never_run(name, root, mistake, monkeypatch):
    monkeypatch.chdir(root)
    (root / name).write_text("import pathlib\npathlib.Path('ran').touch()\ncfg = {}\n")
    assert name in mistake("--config-file", str(root / name))
    assert not (root / "ran").exists()


@pytest.mark.parametrize(
    "text", ["- 1\n- 2\n", "word", "[" * 5000, "a: !!python/object/apply:os.getcwd []", "a: [1,\n :", "1: 2", "\x01"]
)
def test_a_config_that_is_none_is_one_line(text, root, mistake):
    (root / "bad.yaml").write_text(text)
    assert "bad.yaml" in mistake("--config-file", str(root / "bad.yaml"))


def test_a_damaged_config_of_an_earlier_run_is_one_line(root, mistake, monkeypatch):
    stopped_in_epoch(monkeypatch, 3, root, "out")
    (root / "out" / "config.yaml").write_text("- not\n- one")
    assert f"{root / 'out' / 'config.yaml'} is no configuration" in mistake()


def test_pipes_are_not_waited_for(root, mistake):
    out = _made(root / "out")
    os.mkfifo(out / "log.txt")
    train_squares(root, out, "OPTIM.MAX_EPOCH", "1")
    assert [path.name for path in out.iterdir() if path.name.startswith("log.txt-")]
    (out / "linear" / "model.pth.tar-1").unlink()
    os.mkfifo(out / "linear" / "model.pth.tar-1")
    train_squares(root, out, "OPTIM.MAX_EPOCH", "1")
    os.mkfifo(root / "pipe.yaml")
    assert "pipe.yaml" in mistake("--config-file", str(root / "pipe.yaml"))
    os.mkfifo(root / "pipe.png")
    with pytest.raises(OSError, match="a pipe"):
        files.read_picture(root / "pipe.png")


def test_an_output_folder_may_be_called_run_txt(root):
    train_squares(root, root / "run.txt")
    assert (root / "run.txt" / "log.txt").is_file() and epochs_in(root / "run.txt" / "linear")


def test_a_console_that_knows_ascii_alone_gets_every_line(tmp_path):
    import io

    log = utils.Logger(str(tmp_path / "log.txt"))
    log.console = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    log.write("Grüße\n")
    log.close()
    assert (
        log.console.buffer.getvalue() == b"Gr\\xfc\\xdfe\n" and (tmp_path / "log.txt").read_text("utf-8") == "Grüße\n"
    )


# -- D: slow or silent -----------------------------------------------------------------------------------------


def test_the_screen_gets_ten_lines_of_settings_and_the_log_all(root, capsys):
    train_squares(root, root / "out", "--no-train")
    screen = capsys.readouterr().out
    before = screen.split("Loading trainer")[0]
    assert len(before.splitlines()) <= 10 and "Linear" in before and str(root / "out") in before
    log = (root / "out" / "log.txt").read_text()
    assert "** Arguments **" in log and "WEIGHT_DECAY: 0.0005" in log and "** System info **" in log


def test_a_sweep_ends_with_its_folder_and_what_to_type_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(fake_home.make(tmp_path))
    monkeypatch.setattr(sys, "argv", ["spotlighter"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", "fewshot", "--hosts", "CoOp", "--datasets", "dtd", "--seeds", "1", "--shots", "1"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert ended.value.code == 0 and str(tmp_path / "output") in last and "spotlighter report output" in last


@pytest.mark.parametrize("command", ["doctor", "attach FORK --dry-run"])
def test_a_dassl_without_scikit_learn_is_told_without_a_traceback(command, tmp_path):
    for name, text in (("dassl", "import sklearn.metrics\n"), ("sklearn", "raise ModuleNotFoundError('no sklearn')\n")):
        (_made(tmp_path / name) / "__init__.py").write_text(text)
    fork = _made(tmp_path / "fork")
    (fork / "train.py").write_text("from dassl.utils import setup_logger\nimport trainers.coop\n")
    (_made(fork / "trainers") / "coop.py").write_text("@TRAINER_REGISTRY.register()\nclass CoOp(TrainerX):\n    pass\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "COLUMNS": "200"}
    arguments = command.replace("FORK", str(fork)).split()
    done = subprocess.run(
        [sys.executable, "-m", "spotlighter_plugin", *arguments], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr + done.stdout
    if command == "doctor":
        assert done.returncode == 1 and "no sklearn" in done.stdout and done.stderr.count("\n") == 1
    else:
        assert "sklearn" not in done.stderr


def test_a_projection_takes_the_one_image_that_is_left_of_a_batch_but_no_batches_of_one():
    from trainers.promptkd import FeatureProjection, PromptKD

    projection = FeatureProjection(4, 6)
    assert torch.isfinite(projection(torch.ones(1, 4))).all() and projection(torch.ones(3, 4)).shape == (3, 6)
    from spotlighter_plugin.workbench.training import settings

    cfg = settings.setup_cfg(
        settings.parse(
            ["--trainer", "PromptKD", "--dataset-config-file", "configs/datasets/dtd.yaml"]
            + ["DATALOADER.TRAIN_X.BATCH_SIZE", "1"]
        ),
        settings.import_trainers_and_datasets(),
    )
    with pytest.raises(ValueError, match="DATALOADER.TRAIN_X.BATCH_SIZE is 1"):
        PromptKD.check_cfg(PromptKD.__new__(PromptKD), cfg)


# -- memory ----------------------------------------------------------------------------------------------------


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_stays_the_same_over_a_thousand_batches_and_twenty_epochs(root, monkeypatch):
    seen = []
    monkeypatch.setattr(Linear, "before_epoch", lambda self: seen.append(resident()))
    options = ["OPTIM.MAX_EPOCH", "21", "DATALOADER.TRAIN_X.BATCH_SIZE", "1", "TRAIN.PRINT_FREQ", "50"]
    monkeypatch.setattr(dassl_kit.Squares, "repeats", 3 * int(os.environ.get("SPOTLIGHTER_SOAK", "1")))
    train_squares(root, root / "out", *options, *ROLLING)
    assert len(seen) == 21 and seen[-1] - seen[5] < 8e6


def test_ten_thousand_classes_are_evaluated_in_a_few_megabytes(tmp_path):
    from dassl.config import get_cfg_default

    evaluator, rng = evaluation.Classification(get_cfg_default()), torch.Generator().manual_seed(0)
    before = resident()
    for _ in range(100):
        labels = torch.randint(10_000, (32,), generator=rng)
        evaluator.process(torch.randn(32, 10_000, generator=rng).scatter(1, labels[:, None], 9.0), labels)
    assert evaluator.evaluate()["accuracy"] > 99
    assert resident() - before < 500e6


def grown(work):
    """By how many bytes the most that this process has in memory is above what it has now."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # forget the most
    work()
    most = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    return 1024 * most - before


def remember(n_classes, keeps_own_logits, shots=4, dim=32):
    rng = torch.Generator().manual_seed(0)
    rows, unit = torch.arange(n_classes).repeat(shots), nn.functional.normalize
    texts = unit(torch.randn(n_classes, dim, generator=rng), dim=-1)
    learned, images, own = memory.ClassMemory([f"class {c}" for c in range(n_classes)], dim), [], []
    for part in rows.split(100):
        images.append(unit(texts[part] + 0.1 * torch.randn(len(part), dim, generator=rng), dim=-1))
        if keeps_own_logits:
            own.append(memory.to_weigh_by(10 * images[-1] @ texts.T, part))
    learned.remember(torch.cat(images), rows, texts, None, 10.0, torch.cat(own) if own else None)
    assert learned.choice.accuracy > 0.5 and (learned.counts == shots).all()


def grown_by_remembering(keeps_own_logits):
    return grown(lambda: remember(10_000, keeps_own_logits))  # 40,000 shots; times classes 1.6 GB


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
@pytest.mark.parametrize("keeps_own_logits", [False, True])
def test_what_is_remembered_takes_memory_by_the_shot_not_by_shots_times_classes(keeps_own_logits):
    code = f"import conftest, test_faults; print(test_faults.grown_by_remembering({keeps_own_logits}))"
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # what is freed goes back, and is not kept by chance
    alone = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=env, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr  # a process of its own: what others have freed does not count
    assert int(alone.stdout.split()[-1]) < 600e6


def test_the_covariance_within_classes_is_the_same_in_chunks(monkeypatch):
    images, rows = torch.randn(50, 6), torch.arange(50) % 7
    whole = memory.statistics(images, rows, 8)
    monkeypatch.setattr(memory, "CHUNK", 16)
    for one, other in zip(whole, memory.statistics(images, rows, 8), strict=True):
        torch.testing.assert_close(one, other)


# -- the document ----------------------------------------------------------------------------------------------


def test_every_row_of_the_document_names_a_test_that_there_is():
    rows = re.findall(r"^\|.*\| `(\w+): (\w+)` \|$", (ROOT / "docs" / "reliability.md").read_text("utf-8"), re.M)
    assert len(rows) > 50
    for file, name in rows:
        assert f"def test_{name}(" in (ROOT / "tests" / f"test_{file}.py").read_text("utf-8"), (file, name)
