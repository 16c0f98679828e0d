"""The bundled text tower's training: resumable, and nothing but the text tower changes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import pretrain_text_tower as tool  # noqa: E402

from datasets import emoji_render  # noqa: E402
from spotlighter_plugin.towers.clip import BUNDLED, load_clip  # noqa: E402


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Train on six concepts of a bundled vendor; the file that was written."""
    monkeypatch.setattr(tool.pretraining, "STYLES", {"twemoji": "flat", "noto-v1": "soft"})
    monkeypatch.setattr(tool, "concepts", lambda folder: emoji_render.concepts()[:6])

    def run(name, steps):
        path = tmp_path / f"{name}.safetensors"
        if not path.exists():
            path.write_bytes(BUNDLED["micro"].read_bytes())
        flags = {"sprites": emoji_render.SPRITES, "work": tmp_path / name, "towers": path, "scenes": 1,
                 "batch": 4, "check-every": 1, "steps": steps}  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["", *(str(part) for k, v in flags.items() for part in (f"--{k}", v))])
        tool.main()
        return path

    return run


def test_a_new_text_tower_leaves_the_image_tower_as_it_was(train):
    path, before = train("new", steps=2), load_clip("micro").state_dict()
    after = load_clip(str(path)).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("visual.") for name in changed)
    with safetensors.safe_open(path, "pt") as file:
        assert "--steps 2" in file.metadata()["text recipe"]


def test_a_killed_training_of_the_text_tower_goes_on_to_the_same_weights(train, monkeypatch):
    whole, batch = safetensors.torch.load_file(train("whole", steps=3)), tool.Scenes.batch

    def killed(self, size, rng):
        if rng.bit_generator.seed_seq.entropy == [1, 2]:
            raise KeyboardInterrupt
        return batch(self, size, rng)

    monkeypatch.setattr(tool.Scenes, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        train("killed", steps=3)
    monkeypatch.setattr(tool.Scenes, "batch", batch)
    resumed = safetensors.torch.load_file(train("killed", steps=3))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_every_caption_names_its_class_and_says_more_than_a_hand_written_prompt():
    scene = emoji_render.render_scene(1, 0, "twemoji", 0, "dark")
    texts = [tool.caption(scene, "crescent moon", "noto", np.random.default_rng(i)) for i in range(200)]
    assert all("crescent moon" in text and len(text.split()) > 6 for text in texts)
    assert len({text.index("crescent moon") for text in texts}) > 5
