"""EmojiScenes: what the bundled benchmark promises."""

import dataclasses

import numpy as np
import pytest
from yacs.config import CfgNode

from datasets import emoji_render, emoji_scenes


def cfg(root, shots=2, classes="base", seed=1, trainer="CoOp"):
    dataset = {"ROOT": str(root), "NUM_SHOTS": shots, "SUBSAMPLE_CLASSES": classes}
    return CfgNode({"DATASET": dataset, "TRAINER": {"NAME": trainer, "MODAL": "base2novel"}, "SEED": seed})


@pytest.fixture
def few_scenes(monkeypatch):
    """Three classes only, so that a data set is drawn in a moment."""
    monkeypatch.setattr(emoji_scenes, "concepts", lambda: emoji_render.concepts()[:5])
    monkeypatch.setattr(emoji_scenes, "TEST_SCENES", 3)


def test_a_scene_is_a_function_of_seed_class_vendor_and_number():
    first, again = (emoji_render.render_scene(1, 5, "twemoji", 0) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    for other in ((2, 5, "twemoji", 0), (1, 6, "twemoji", 0), (1, 5, "noto-v1", 0), (1, 5, "twemoji", 1)):
        assert not np.array_equal(first.image, emoji_render.render_scene(*other).image)


@pytest.mark.parametrize("domain", emoji_render.DOMAINS)
def test_every_domain_gives_a_picture_of_its_own_with_the_sprite_inside(domain):
    scene = emoji_render.render_scene(1, 5, "twemoji", 0, domain)
    assert scene.image.shape == (96, 96, 3) and scene.image.dtype == np.uint8
    left, top, right, bottom = scene.box
    assert 0 <= left < right <= 96 and 0 <= top < bottom <= 96 and 40 <= right - left <= 64
    plain = emoji_render.render_scene(1, 5, "twemoji", 0)
    assert domain == "normal" or not np.array_equal(scene.image, plain.image)
    assert dataclasses.replace(scene, image=plain.image, domain="normal").box == plain.box


def test_there_are_at_least_300_concepts_with_distinct_names_and_drawings():
    names = emoji_render.concepts()
    assert len(names) == len(set(names)) >= 300
    for vendor in ("twemoji", "noto-v1", "fluent-emoji"):
        drawings = {sprite.tobytes() for sprite in emoji_render.sprite_sheet(vendor)}
        assert len(drawings) == len(names)


def test_base_and_new_have_at_least_3000_test_scenes_each():
    half = len(emoji_render.concepts()) // 2
    assert half * emoji_scenes.TEST_SCENES >= 3000


def test_a_vendor_that_is_not_bundled_is_named_in_one_line():
    with pytest.raises(FileNotFoundError, match="no sprites of vendor 'openmoji'.*build_sprites"):
        emoji_render.sprite_sheet("openmoji")


def test_shots_depend_on_the_seed_and_splits_do_not_overlap(tmp_path, few_scenes):
    first, second = (emoji_scenes.EmojiScenes(cfg(tmp_path, seed=seed)) for seed in (1, 2))
    paths = [{item.impath for item in part} for part in (first.train_x, first.val, first.test)]
    assert not paths[0] & paths[1] and not paths[0] & paths[2] and not paths[1] & paths[2]
    assert {item.impath for item in second.train_x} != paths[0]
    assert {item.impath for item in second.test} == paths[2]
    assert len(first.train_x) == 2 * 3 and first.num_classes == 3


def test_base_and_new_are_the_two_halves_of_the_classes(tmp_path, few_scenes):
    base, new = (emoji_scenes.EmojiScenes(cfg(tmp_path, classes=part)) for part in ("base", "new"))
    assert base.classnames + new.classnames == emoji_render.concepts()[:5]


def test_choices_are_made_on_validation_scenes_of_base_classes_alone(tmp_path, few_scenes):
    parts = [emoji_scenes.EmojiScenes(cfg(tmp_path, classes=part)) for part in ("inner-base", "inner-new")]
    base = emoji_scenes.EmojiScenes(cfg(tmp_path))
    assert parts[0].classnames + parts[1].classnames == base.classnames
    seen = {item.impath for part in parts for item in [*part.train_x, *part.val, *part.test]}
    assert not seen & {item.impath for item in base.test}


def test_the_shift_tests_a_vendor_that_neither_shots_nor_validation_show(tmp_path, few_scenes):
    data = emoji_scenes.EmojiScenesShift(cfg(tmp_path))
    vendors = [
        {item.impath.rsplit("/", 1)[1].rsplit("_", 1)[0] for item in part}
        for part in (data.train_x, data.val, data.test)
    ]
    assert vendors == [{"twemoji"}, {"noto-v1"}, {"fluent-emoji"}]


@pytest.mark.parametrize(
    ("options", "line"),
    [({"shots": 40}, "DATASET.NUM_SHOTS is 40"), ({"classes": "bass"}, "DATASET.SUBSAMPLE_CLASSES is 'bass'")],
)
def test_an_impossible_choice_is_one_clear_line(tmp_path, options, line):
    with pytest.raises(ValueError, match=line):
        emoji_scenes.EmojiScenes(cfg(tmp_path, **options))


def test_promptkd_trains_on_all_classes_and_tests_base_and_new_in_one_run(tmp_path, few_scenes):
    data = emoji_scenes.EmojiScenes(cfg(tmp_path, trainer="PromptKD"))
    assert {item.classname for item in data.train_x} == set(emoji_render.concepts()[:5])
    assert {item.classname for item in data.val} == set(emoji_render.concepts()[:3])
    assert {item.classname for item in data.test} == set(emoji_render.concepts()[3:5])
