"""IconScenes: what the bundled benchmark and its two towers promise."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from scenes_kit import fewer_scenes
from yacs.config import CfgNode

from datasets import icon_drawings, icon_render, icon_scenes
from spotlighter_plugin.towers.clip import BUNDLED, encode_prompts, load_clip
from spotlighter_plugin.workbench.sweeps.plan import ICONS
from spotlighter_plugin.workbench.training.settings import import_trainers_and_datasets, parse, setup_cfg

KINDS = {kind.domain: kind for kind in (icon_scenes.IconScenes, *icon_scenes.IconScenes.__subclasses__())}
DRAWN = [("train", 3, 0, 0), ("train", 3, 0, 1), ("val", 70, 2, 1), ("test", 124, 7, 5)]


def cfg(root, shots=2, classes="base", seed=1, trainer="CoOp"):
    dataset = {"ROOT": str(root), "NUM_SHOTS": shots, "SUBSAMPLE_CLASSES": classes}
    return CfgNode({"DATASET": dataset, "TRAINER": {"NAME": trainer, "MODAL": "base2novel"}, "SEED": seed})


@pytest.fixture
def few_scenes(monkeypatch):
    """Five classes only, so that a data set is drawn in a moment."""
    fewer_scenes(monkeypatch, concepts=5)


def test_a_scene_depends_on_its_own_split_domain_class_drawing_and_number_alone():
    together = icon_scenes.render("source", DRAWN * 16)  # 64 at once
    alone = [icon_scenes.render("source", [scene])[0] for scene in DRAWN]
    for start in (0, 60):
        assert np.array_equal(together[start : start + 4], alone)
    other = [("test", 3, 0, 0), ("train", 4, 0, 0), ("train", 3, 1, 0), ("train", 3, 0, 2)]
    assert len({image.tobytes() for image in [*alone, *icon_scenes.render("source", other)]}) == 8


DIGESTS = {
    "source": "130dcc726b471198",
    "inverted": "42f8981170ebf6dd",
    "colour": "a988fedca2d77d76",
    "pixel": "99b7f46adcf3fe0a",
    "dark": "4dd99bdad1d6274e",
}


@pytest.mark.parametrize("domain", icon_render.DOMAINS)
def test_scenes_are_byte_for_byte_what_they_were_on_the_machine_that_this_was_written_on(domain):
    images = icon_scenes.render(domain, DRAWN)
    assert images.shape == (4, 112, 112, 3) and images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == DIGESTS[domain]


def test_every_domain_has_scenes_of_its_own_not_the_source_s_shifted():
    drawn = {domain: icon_scenes.render(domain, DRAWN).astype(int) for domain in icon_render.DOMAINS}
    assert set(KINDS) == set(drawn)
    source = drawn["source"]
    assert np.abs(drawn["inverted"] - (255 - source)).mean() > 10
    assert np.abs(drawn["dark"] - source // 3).mean() > 10
    for image, plain in zip(drawn["pixel"], source, strict=True):
        blocks = image.reshape(28, 4, 28, 4, 3)
        assert (blocks == blocks[:, :1, :, :1]).all() and np.abs(image - plain).mean() > 10


def test_base_and_new_have_at_least_2500_test_scenes_each():
    half, drawings = len(icon_drawings.concepts()) // 2, icon_drawings.drawings("test")[0].shape[1]
    assert half * drawings * icon_scenes.TEST_SCENES >= 2500


def test_shots_depend_on_the_seed_and_no_drawing_is_in_two_splits(tmp_path, few_scenes):
    first, second = (icon_scenes.IconScenes(cfg(tmp_path, seed=seed)) for seed in (1, 2))
    paths = [{Path(item.impath) for item in part} for part in (first.train_x, first.val, first.test)]
    for split, part in zip(("train", "val", "test"), paths, strict=True):
        assert {path.parents[1].name for path in part} == {split}  # each folder has drawings of its own
    assert {Path(item.impath) for item in second.train_x} != paths[0]
    assert {Path(item.impath) for item in second.test} == paths[2]
    assert len(first.train_x) == 2 * 3 and first.num_classes == 3
    drawn = [path.name.split("_")[0] for path in paths[0] if path.parent.name == "airplane"]
    assert len(drawn) == len(set(drawn)) == 2


def test_what_is_written_is_what_is_drawn(tmp_path, few_scenes):
    from PIL import Image

    data = icon_scenes.IconScenesDark(cfg(tmp_path))
    item = data.test[0]
    assert item.impath == str(tmp_path / "icon_scenes/dark/test/airplane/00_0.png")
    assert np.array_equal(np.asarray(Image.open(item.impath)), icon_scenes.render("dark", [("test", 0, 0, 0)])[0])
    assert not list(tmp_path.rglob("*.tmp"))


def test_base_and_new_are_the_two_halves_of_the_classes(tmp_path, few_scenes):
    base, new = (icon_scenes.IconScenes(cfg(tmp_path, classes=part)) for part in ("base", "new"))
    assert base.classnames + new.classnames == icon_drawings.concepts()[:5]


def test_choices_are_made_on_validation_scenes_of_base_classes_alone(tmp_path, few_scenes):
    parts = [icon_scenes.IconScenes(cfg(tmp_path, classes=part)) for part in ("inner-base", "inner-new")]
    base = icon_scenes.IconScenes(cfg(tmp_path))
    assert parts[0].classnames + parts[1].classnames == base.classnames
    seen = {item.impath for part in parts for item in [*part.train_x, *part.val, *part.test]}
    assert not seen & {item.impath for item in base.test}


@pytest.mark.parametrize(
    ("options", "line"),
    [({"shots": 17}, "DATASET.NUM_SHOTS is 17"), ({"classes": "bass"}, "DATASET.SUBSAMPLE_CLASSES is 'bass'")],
)
def test_an_impossible_choice_is_one_clear_line(tmp_path, options, line):
    with pytest.raises(ValueError, match=line):
        icon_scenes.IconScenes(cfg(tmp_path, **options))


def test_promptkd_trains_on_all_classes_and_tests_base_and_new_in_one_run(tmp_path, few_scenes):
    data = icon_scenes.IconScenes(cfg(tmp_path, trainer="PromptKD"))
    names = icon_drawings.concepts()
    assert {item.classname for item in data.train_x} == set(names[:5])
    assert {item.classname for item in data.val} == set(names[:3])
    assert {item.classname for item in data.test} == set(names[3:5])


def test_each_member_of_the_family_has_a_configuration(tmp_path):
    modules = import_trainers_and_datasets()
    for name in ICONS:
        made = setup_cfg(
            parse(["--trainer", "CoOp", "--dataset-config-file", f"configs/datasets/{name}.yaml"]), modules
        )
        assert made.DATASET.NAME in {kind.__name__ for kind in KINDS.values()}
        assert tuple(made.INPUT.SIZE) == (112, 112) and made.MODEL.BACKBONE.NAME == "tiny"


@pytest.mark.parametrize(("name", "width", "least"), [("tiny", 128, 45), ("micro", 64, 25)])
def test_the_towers_have_vit_b16s_blocks_and_tokens_and_know_the_classes(name, width, least):
    clip, names = load_clip(name), icon_drawings.concepts()
    vision = clip.visual
    assert len(vision.transformer.resblocks) == 12 and vision.conv1.out_channels == width
    assert vision.positional_embedding.shape == (1 + 196, width) and vision.input_resolution == 112
    labels = torch.arange(0, len(names), 2)
    images = torch.from_numpy(icon_scenes.render("source", [("test", int(label), 0, 0) for label in labels]))
    mean, std = (255 * torch.tensor(a) for a in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
    with torch.no_grad():
        features = vision(((images - mean) / std).permute(0, 3, 1, 2))
    found = (features @ encode_prompts(clip, [f"a photo of a {name}." for name in names]).T).argmax(1)
    assert 100 * (found == labels).float().mean() >= least  # of 125 classes; chance is 0.8


@pytest.mark.parametrize("name", BUNDLED)
def test_weights_say_how_they_were_made_and_what_they_reach_on_test_drawings(name):
    with safetensors.safe_open(BUNDLED[name], "pt") as file:
        said = {key: json.loads(value) for key, value in file.metadata().items()}
    assert {"minutes", "device", "scenes_seen", "width", "seed", "text_scenes", "text_steps"} <= set(said["recipe"])
    accuracy = said["zero-shot on test drawings"]
    assert tuple(accuracy) == icon_render.DOMAINS
    shifts = [accuracy[domain] for domain in icon_render.DOMAINS[1:]]
    assert accuracy["source"] > max(shifts) and min(shifts) > (15 if name == "tiny" else 5)
