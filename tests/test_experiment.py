"""Experiments on cached hidden states: the same figures as plain training."""

import contextlib
import io

import numpy as np
import pytest
import torch
from scenes_kit import fewer_scenes

from spotlighter_plugin.workbench.training.cached import HiddenStates
from spotlighter_plugin.workbench.training.experiment import Laboratory, Method, harmonic_mean

DATASET = "configs/datasets/icon_scenes.yaml"
SHORT = {
    "DATASET.NUM_SHOTS": 2, "OPTIM.MAX_EPOCH": 2, "OPTIM.LR": 0.02, "DATALOADER.TRAIN_X.BATCH_SIZE": 4,
    "DATALOADER.NUM_WORKERS": 0, "TRAINER.COOP.CTX_INIT": "a photo of a",
}  # fmt: skip


@pytest.fixture
def few_scenes(monkeypatch):
    fewer_scenes(monkeypatch)


@pytest.mark.parametrize(("name", "options"), [("CoOp", {}), ("CoOpSpotlighter", {"TRAINER.SPOTLIGHTER.TOP_K": 36})])
def test_cached_states_give_the_logits_of_whole_images(tmp_path, few_scenes, name, options):
    method = Method(name, name, {**SHORT, **options})
    logits = {}
    for block in (-2, None):
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = Laboratory(DATASET, str(tmp_path), block).trainer(method, 1, "base", str(tmp_path / f"{block}"))
        trainer.set_model_mode("eval")
        with torch.no_grad():
            logits[block] = trainer.model_inference(trainer.parse_batch_test(next(iter(trainer.test_loader)))[0])
    assert torch.allclose(logits[-2], logits[None], atol=0.05)
    assert logits[-2].std() > 0.05


def test_an_experiment_tests_every_image_of_both_halves(tmp_path, few_scenes):
    result = Laboratory(DATASET, str(tmp_path)).run(Method("CoOp", "CoOp", SHORT), 1)
    assert {part: len(right) for part, right in result.correct.items()} == {"base": 6, "new": 6}
    assert result.parameters == 4 * 128


@pytest.mark.parametrize("block", [-1, None])
def test_a_quick_look_tests_every_second_image(tmp_path, few_scenes, block):
    method = Method("zero-shot CLIP", "ZeroshotCLIP", {"DATALOADER.NUM_WORKERS": 0})
    every, some = (Laboratory(DATASET, str(tmp_path), block, thin=thin).run(method, 1) for thin in (1, 2))
    for part in ("base", "new"):
        assert np.array_equal(some.correct[part], every.correct[part][::2])


def test_the_same_seed_gives_the_same_experiment_twice(tmp_path, few_scenes):
    method = Method("CoOpSpotlighter", "CoOpSpotlighter", SHORT)
    first, again = (Laboratory(DATASET, str(tmp_path)).run(method, 1) for _ in range(2))
    for part in ("base", "new"):
        assert np.array_equal(first.correct[part], again.correct[part])


def test_states_of_augmented_images_are_refused_in_one_line():
    from spotlighter_plugin.workbench.training.settings import import_trainers_and_datasets, parse, setup_cfg

    flags = ["--trainer", "CoOp", "--dataset-config-file", DATASET, "--transforms", "random_flip", "normalize"]
    with pytest.raises(ValueError, match="INPUT.TRANSFORMS.*cannot be kept"):
        HiddenStates(setup_cfg(parse(flags), import_trainers_and_datasets()), -1)


def test_the_harmonic_mean_is_that_of_both_halves():
    assert harmonic_mean(80, 60) == pytest.approx(2 / (1 / 80 + 1 / 60))
    assert harmonic_mean(0, 0) == 0


def test_states_behind_a_methods_cut_and_readouts_for_its_tokens_are_refused_in_one_line(tmp_path, few_scenes):
    laboratory = Laboratory(DATASET, str(tmp_path), block=-1)
    with pytest.raises(ValueError, match="SELECT_BLOCK") as error:
        laboratory.run(Method("CoOpSpotlighter", "CoOpSpotlighter", SHORT), 1)
    assert "\n" not in str(error.value)


def test_what_is_read_out_is_the_same_whether_tokens_are_kept_or_not(tmp_path, few_scenes):
    laboratory = Laboratory(DATASET, str(tmp_path))
    first, again = (laboratory.run(Method("CoOp", "CoOp", SHORT, sees_tokens=sees), 1) for sees in (True, False))
    assert np.mean([np.mean(first.correct[part] == again.correct[part]) for part in ("base", "new")]) > 0.9
