"""The configuration files of this repository, and what the command line makes of them."""

from pathlib import Path

import pytest

from spotlighter_plugin.workbench.training import settings
from spotlighter_plugin.workbench.training import train as training

ROOT = Path(__file__).resolve().parent.parent
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
    assert training.one_line(caught.value).startswith("test_train_settings.py:")
