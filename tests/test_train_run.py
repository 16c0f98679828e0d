"""train.py: what a run leaves behind, how it continues, and what it says about mistakes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dassl_kit import CLASSES, PER_CLASS, Linear, draw_squares, squares_args, train_squares, weights

from spotlighter_plugin.workbench.training import settings
from spotlighter_plugin.workbench.training import train as training
from spotlighter_plugin.workbench.training.train import main, run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root(tmp_path):
    draw_squares(tmp_path)
    return tmp_path


@pytest.fixture
def mistake(root, capsys):
    """Runs with the given arguments, which must fail with exit code 1 and one line; returns that line."""

    def fail(*options, flags=None):
        console = sys.stdout
        code = main(squares_args(root, root / "out", *options) if flags is None else flags)
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert code == 1 and len(lines) == 1 and "Traceback" not in error
        assert sys.stdout is console
        return lines[0]

    return fail


def test_a_run_learns_and_prints_the_result_block_and_log_lines_of_dassl(root, capsys):
    done = train_squares(root, root / "out")
    log = (root / "out" / "log.txt").read_text()
    accuracy = float(re.search(r"^\* accuracy: ([\d.]+)%$", log, re.M)[1])
    assert accuracy == pytest.approx(done.results["accuracy"], abs=0.05)
    assert accuracy > 80
    assert re.search(r"^=> result\n\* total: 24\n\* correct: \d+\n\* accuracy", log, re.M)
    assert re.search(r"^\* error: [\d.]+%\n\* macro_f1: [\d.]+%$", log, re.M)
    assert re.search(
        r"^epoch \[1/4\] batch \[2/4\] time [\d.]+ \([\d.]+\) data [\d.]+ \([\d.]+\) "
        r"loss [\d.]+ \([\d.]+\) acc [\d.]+ \([\d.]+\) lr 1\.0000e-05 eta \d:\d\d:\d\d$",
        log,
        re.M,
    )
    assert capsys.readouterr().out.count("* accuracy:") == 1


def test_checkpoints_lie_where_upstream_puts_them_and_hold_plain_values(root):
    train_squares(root, root / "out", "TEST.FINAL_MODEL", "best_val")
    folder = root / "out" / "linear"
    assert {p.name for p in folder.iterdir()} == {
        "checkpoint",
        "model-best.pth.tar",
        *(f"model.pth.tar-{epoch}" for epoch in (1, 2, 3, 4)),
    }
    saved = torch.load(folder / "model.pth.tar-4", weights_only=True)
    assert saved["epoch"] == 4
    assert {"state_dict", "optimizer", "scheduler", "val_result"} <= saved.keys()


def test_the_same_seed_gives_the_same_weights_and_another_does_not(root):
    first, second = (weights(train_squares(root, root / out, "DATASET.NUM_SHOTS", "5")) for out in "ab")
    other = weights(train_squares(root, root / "c", "--seed", "7", "DATASET.NUM_SHOTS", "5"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_killed_run_that_is_resumed_ends_as_an_uninterrupted_one(root, monkeypatch, workers):
    options = ("DATALOADER.NUM_WORKERS", workers, "DATASET.NUM_SHOTS", "5", "TEST.FINAL_MODEL", "best_val")
    whole = train_squares(root, root / "whole", *options)

    monkeypatch.setattr(Linear, "break_at", 3)
    with pytest.raises(FloatingPointError):
        train_squares(root, root / "killed", *options)
    monkeypatch.undo()
    resumed = train_squares(root, root / "killed", "--resume", str(root / "killed"), *options)

    assert resumed.trainer.start_epoch == 2
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    assert resumed.results == whole.results
    assert resumed.trainer.best_result == whole.trainer.best_result


def test_a_run_killed_between_two_files_of_an_epoch_resumes_from_the_epoch_that_is_whole(root):
    train_squares(root, root / "out")
    torn = root / "out" / "linear" / "model.pth.tar-4"
    torn.rename(torn.with_name(f"{torn.name}.123.tmp"))
    assert train_squares(root, root / "out").trainer.start_epoch == 3


def test_a_nan_loss_stops_names_the_batch_and_keeps_the_last_checkpoint(mistake, root, monkeypatch):
    monkeypatch.setattr(Linear, "break_at", 3)
    line = mistake()
    assert "epoch [3/4] batch [2/4]" in line and "epoch 2" in line
    assert (root / "out" / "linear" / "model.pth.tar-2").is_file()
    assert not (root / "out" / "linear" / "model.pth.tar-3").exists()


def test_eval_only_gives_the_accuracy_of_the_trained_model(root):
    trained = train_squares(root, root / "out")
    evaluated = train_squares(root, root / "eval", "--eval-only", "--model-dir", str(root / "out"), "--load-epoch", "4")
    assert evaluated.results == trained.results
    assert not (root / "eval" / "linear").exists()


def test_without_output_dir_each_data_set_trainer_half_and_seed_has_its_own_folder(root, monkeypatch):
    monkeypatch.chdir(root)
    plain = squares_args(root, "x")[:-2]
    assert run([*plain, "--no-train"]).cfg.OUTPUT_DIR == "output/Squares/Linear/seed1"
    half = run([*plain, "--no-train", "--seed", "3", "DATASET.SUBSAMPLE_CLASSES", "base"])
    assert half.cfg.OUTPUT_DIR == "output/Squares/Linear/base/seed3"
    assert run([*plain, "--no-train", "OUTPUT_DIR", "mine"]).cfg.OUTPUT_DIR == "mine"
    assert (root / "mine" / "log.txt").is_file()


def test_unlabelled_batches_run_beside_labelled_ones(root):
    done = train_squares(root, root / "out", "--trainer", "LinearXU", "DATASET.ALL_AS_UNLABELED", "True")
    assert done.results["accuracy"] > 80 and done.trainer.num_batches == 4
    short = train_squares(
        root, root / "short", "--trainer", "LinearXU", "DATASET.ALL_AS_UNLABELED", "True", "DATASET.NUM_SHOTS", "2",
        "TRAIN.COUNT_ITER", "train_u",
    )  # fmt: skip
    assert len(short.trainer.train_loader_x) == 1 and short.trainer.num_batches == 4


def test_a_trainer_that_builds_no_model_of_its_own_gets_a_registered_backbone_and_a_classifier(root):
    done = train_squares(root, root / "out", "--trainer", "Plain", "--backbone", "Flat", "OPTIM.MAX_EPOCH", "1")
    assert {"classifier.weight", "classifier.bias"} == set(weights(done)) and done.results["accuracy"] > 30


def test_no_train_builds_and_stops(root):
    done = train_squares(root, root / "out", "--no-train")
    assert done.results == {} and not (root / "out" / "linear").exists()


def test_damaged_and_missing_images_are_left_out_and_counted(root):
    (root / "squares" / "red" / "0.png").write_bytes(b"")
    whole = (root / "squares" / "green" / "1.png").read_bytes()
    (root / "squares" / "green" / "1.png").write_bytes(whole[: len(whole) // 2])
    (root / "squares" / "blue" / "2.png").unlink()
    (root / "squares" / "blue" / "2.png").symlink_to(root / "nowhere.png")
    train_squares(root, root / "out")
    log = (root / "out" / "log.txt").read_text()
    assert "Skipped 3 of 24 images" in log and "* total: 21\n" in log


def test_only_unreadable_images_are_an_error(mistake, root):
    for path in (root / "squares").glob("*/*.png"):
        path.write_bytes(b"no image")
    assert "none of the 20 images can be read" in mistake() and not (root / "out" / "linear").exists()


def test_a_class_without_images_is_named(mistake, root):
    for path in (root / "squares" / "green").glob("*.png"):
        path.unlink()
    assert "1 of 3 classes have no training image: label 1" in mistake()


def test_an_output_folder_that_cannot_be_written_is_reported_before_anything_is_built(mistake, root):
    (root / "file").write_text("")
    line = mistake(flags=squares_args(root, root / "file" / "out"))
    assert f"--output-dir {root / 'file' / 'out'}: cannot write there" in line


def test_a_folder_with_a_run_of_other_settings_is_not_continued(mistake, root):
    train_squares(root, root / "out")
    assert "OPTIM.LR 0.01, this one has 0.02" in mistake("OPTIM.LR", "0.02")
    assert train_squares(root, root / "out", "DATALOADER.NUM_WORKERS", "1").trainer.start_epoch == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["OPTIM.LRR", "1"], "did you mean OPTIM.LR?"),
        (["OPTIM.MAX_EPOCH", "many"], "OPTIM.MAX_EPOCH many"),
        (["OPTIM.MAX_EPOCH"], "stands alone"),
        (["OPTIM.MAX_EPOCH", "0"], "must be at least 1"),
        (["OPTIM.NAME", "sgdd"], "sgdd"),
        (["OPTIM.LR_SCHEDULER", "cosinus"], "cosine"),
        (["DATASET.NAME", "Squarse"], "did you mean Squares?"),
        (["DATALOADER.TRAIN_X.BATCH_SIZE", "0"], "BATCH_SIZE is 0"),
        (["--trainer", "Liner"], "did you mean Linear?"),
        (["--config-file", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--resume", "nowhere"], "--resume nowhere: no such folder"),
        (["--eval-only", "--model-dir", "nowhere", "--load-epoch", "3"], "nowhere"),
        (["--seed", "one"], "invalid int value"),
        (["OPTIM.LR", "0.1", "--seed", "2"], "flags come before"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(mistake, options, said):
    assert said in mistake(*options)


def test_a_broken_config_file_is_one_line(mistake, root):
    (root / "bad.yaml").write_text("OPTIM: [1,\n  :")
    assert "bad.yaml" in mistake("--config-file", str(root / "bad.yaml"))
    (root / "bad.yaml").write_text("OPTIM:\n  LEARNING: 3\n")
    assert "LEARNING" in mistake("--config-file", str(root / "bad.yaml"))


def test_a_checkpoint_of_another_width_is_one_line(mistake, root):
    train_squares(root, root / "trained")
    evaluate = ("--eval-only", "--model-dir", str(root / "trained"), "--load-epoch", "4")
    assert "2.weight of shape (3, 768), the model wants (3, 192)" in mistake(*evaluate, "INPUT.SIZE", "(8, 8)")


def test_train_py_itself_reports_an_unknown_trainer_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "train.py", "--trainer", "CoOpp"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "did you mean CoOp?" in done.stderr


def test_the_squares_are_what_the_tests_assume(root):
    assert len(list((root / "squares").glob("*/*.png"))) == len(CLASSES) * PER_CLASS


# ---------------------------------------------------------------------------------------------- the configuration files


TRAINER_FILES = sorted((ROOT / "configs" / "trainers").glob("*/*.yaml"))
DATASET_FILES = sorted((ROOT / "configs" / "datasets").glob("*.yaml"))
SCENES = ["--dataset-config-file", "configs/datasets/icon_scenes.yaml"]


@pytest.fixture(scope="module")
def modules():
    return settings.import_trainers_and_datasets()


def cfg_of(modules, *flags):
    return settings.setup_cfg(settings.parse(list(flags)), modules)


@pytest.mark.parametrize("file", TRAINER_FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_each_trainer_file_fits_the_configuration_and_its_trainer_is_registered(file, modules):
    cfg = cfg_of(modules, "--trainer", file.parent.name, "--config-file", str(file), *SCENES)
    assert file.parent.name == cfg.TRAINER.NAME and cfg.is_frozen()


@pytest.mark.parametrize("file", DATASET_FILES, ids=lambda file: file.stem)
def test_each_data_set_file_names_a_registered_data_set(file, modules):
    assert cfg_of(modules, "--trainer", "CoOp", "--dataset-config-file", str(file)).DATASET.NAME


def test_a_trainer_takes_its_own_default_file_and_the_data_set_chooses_size_and_backbone(modules):
    cfg = cfg_of(modules, "--trainer", "CoOp", *SCENES)
    assert (cfg.OPTIM.MAX_EPOCH, cfg.OPTIM.LR, cfg.OPTIM.WARMUP_TYPE) == (50, 0.002, "constant")
    assert (cfg.MODEL.BACKBONE.NAME, tuple(cfg.INPUT.SIZE), cfg.INPUT.INTERPOLATION) == ("tiny", (112, 112), "bicubic")
    photos = cfg_of(modules, "--trainer", "CoOp", "--dataset-config-file", "configs/datasets/dtd.yaml")
    assert photos.MODEL.BACKBONE.NAME == "ViT-B/16" and tuple(photos.INPUT.SIZE) == (224, 224)
    assert "random_resized_crop" in photos.INPUT.TRANSFORMS


def test_flags_win_over_files_and_trailing_options_over_flags(modules):
    cfg = cfg_of(modules, "--trainer", "CoOp", *SCENES, "--backbone", "ViT-B/32", "--seed", "3", "--root", "there")
    assert (cfg.MODEL.BACKBONE.NAME, cfg.SEED, cfg.DATASET.ROOT) == ("ViT-B/32", 3, "there")
    cfg = cfg_of(modules, "--trainer", "CoOp", *SCENES, "--seed", "3", "SEED", "4", "OPTIM.LR", "1")
    assert (cfg.SEED, cfg.OPTIM.LR) == (4, 1.0)


def test_a_negative_seed_is_kept_as_not_seeded(modules):
    assert cfg_of(modules, "--trainer", "CoOp", *SCENES, "--seed", "-1").SEED == -1
    assert cfg_of(modules, "--trainer", "CoOp", *SCENES).SEED == settings.DEFAULT_SEED


def test_a_bug_keeps_its_traceback_and_an_interrupt_has_its_own_exit_code(monkeypatch, capsys):
    def stop(error):
        def run(argv):
            raise error

        monkeypatch.setattr(training, "run", run)

    stop(TypeError("a bug"))
    with pytest.raises(TypeError):
        training.main([])
    stop(KeyboardInterrupt())
    assert training.main([]) == 130 and "--resume" in capsys.readouterr().err
    stop(ValueError("a mistake\n  on two lines"))
    assert training.main([]) == 1 and capsys.readouterr().err == "error: a mistake on two lines\n"
    monkeypatch.setenv("SPOTLIGHTER_DEBUG", "1")
    with pytest.raises(ValueError, match="a mistake"):
        training.main([])


def test_an_assertion_without_words_names_the_place():
    def require():
        assert 1 > 2

    with pytest.raises(AssertionError) as caught:
        require()
    caught.value.args = ()
    assert training.one_line(caught.value).startswith("test_train_run.py:")
