"""IconScenes, the bundled benchmark: scenes around drawings by many hands, no drawing in two splits.

A class is a concept that 28 different drawings show: 16 for shots, 4 for validation, 8 for test; pre-training saw
others. Scenes are pure functions of (split, domain, class, drawing, number), drawn by ``icon_render`` and written
once as PNG under ``<root>/icon_scenes/<domain>/<split>/<class>/``; only those that a run asks for are written. The
first half of the classes is base, the other new. Five data sets share the drawings and differ in their domain, and so
in every scene.
"""

import hashlib
import os
import random
from pathlib import Path

import numpy as np
import torch
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from PIL import Image
from rich.progress import track

from spotlighter_plugin.files import aside_of, sweep_leftovers

from . import icon_render
from .common import splits_of_the_protocol, takes_all_classes
from .icon_drawings import concepts, drawings

DRAWINGS = {"train": "shots", "val": "val", "test": "test"}  # split → whose drawings
SHOTS, VARIANTS = 16, 4  # drawings of a class for shots, and scenes of each from which SEED takes one
VAL_SCENES, TEST_SCENES = 2, 6  # scenes of each drawing
AT_ONCE = 64  # scenes drawn together


@DATASET_REGISTRY.register()
class IconScenes(DatasetBase):
    """The source domain: dark drawings on light grounds.

    ``DATASET.NUM_SHOTS`` drawings of a class, and one scene of each, are chosen by ``SEED``; more than 16 is a
    ValueError, below 1 takes all. ``DATASET.SUBSAMPLE_CLASSES`` is all, base or new, as for every data set, or
    inner-base or inner-new: the halves of the base classes, tested on their validation scenes, for choosing
    hyper-parameters.
    """

    domain = "source"

    def __init__(self, cfg):
        shots, subsample = cfg.DATASET.NUM_SHOTS, cfg.DATASET.SUBSAMPLE_CLASSES
        inner = subsample.startswith("inner")
        if shots > SHOTS:
            raise ValueError(f"DATASET.NUM_SHOTS is {shots}: IconScenes has {SHOTS} drawings of a class for shots")
        self.dataset_dir = Path(os.path.expanduser(cfg.DATASET.ROOT)).absolute() / "icon_scenes"
        self.names = concepts()
        distilled = takes_all_classes(cfg)
        labels = self._classes("all" if distilled else subsample)
        n_val = drawings("val")[0].shape[1]
        every_val = [(drawing, number) for drawing in range(n_val) for number in range(VAL_SCENES)]
        n_test = drawings("test")[0].shape[1]
        every_test = [(drawing, number) for drawing in range(n_test) for number in range(TEST_SCENES)]
        items = []
        for new, label in enumerate(labels):
            draw = random.Random(f"{cfg.SEED} {label}")
            few = draw.sample(range(SHOTS), shots if shots >= 1 else SHOTS)
            items += [("train", "train", label, new, (drawing, draw.randrange(VARIANTS))) for drawing in few]
            items += [("val", "val", label, new, scene) for scene in every_val]
            source, scenes = ("val", every_val) if inner else ("test", every_test)
            items += [("test", source, label, new, scene) for scene in scenes]
        self._write([(source, label, *scene) for _, source, label, _, scene in items])
        splits = {"train": [], "val": [], "test": []}
        for split, source, label, new, scene in items:
            splits[split].append(Datum(str(self._path(source, label, *scene)), new, 0, self.names[label]))
        train, val, test = splits.values()
        if distilled:
            train, val, test = splits_of_the_protocol(cfg, train, val, test)
        super().__init__(train_x=train, val=val, test=test)

    def _classes(self, subsample):
        """Labels of a part of the classes, in their order."""
        every = range(len(self.names))
        half = -(-len(every) // 2)
        inner = -(-half // 2)
        parts = {
            "all": every, "base": every[:half], "new": every[half:],
            "inner-base": every[:inner], "inner-new": every[inner:half],
        }  # fmt: skip
        if subsample not in parts:
            raise ValueError(f"DATASET.SUBSAMPLE_CLASSES is {subsample!r}: take {', '.join(parts)}")
        return parts[subsample]

    def _path(self, split, label, drawing, number):
        folder = self.dataset_dir / self.domain / split / self.names[label].replace(" ", "_")
        return folder / f"{drawing:02d}_{number}.png"

    def _write(self, scenes):
        missing = [scene for scene in dict.fromkeys(scenes) if not self._path(*scene).exists()]
        missing.sort(key=lambda scene: scene[0])  # one split after the other: its drawings are one array
        for split in {scene[0] for scene in missing}:
            sweep_leftovers(self.dataset_dir / self.domain / split)
        batches = [missing[start : start + AT_ONCE] for start in range(0, len(missing), AT_ONCE)]
        for batch in track(batches, f"{type(self).__name__}: drawing", disable=not missing):
            for scene, image in zip(batch, render(self.domain, batch), strict=True):
                path = self._path(*scene)
                path.parent.mkdir(parents=True, exist_ok=True)
                aside = aside_of(path)
                Image.fromarray(image).save(aside, format="PNG", compress_level=1)
                os.replace(aside, path)


def render(domain: str, scenes: list[tuple[str, int, int, int]], device: str = "cpu") -> np.ndarray:
    """Scenes (split, class, drawing, number) of a domain: (n, 112, 112, 3) uint8, the same on every machine.

    Distractors are drawings of other classes in the same split.
    """
    keys = [f"IconScenes {domain} {split} {label} {drawing} {number}" for split, label, drawing, number in scenes]
    width = icon_render.NUMBERS + 2 * icon_render.DISTRACTORS
    drawn = [np.frombuffer(hashlib.shake_128(key.encode()).digest(2 * width), "<u2") for key in keys]
    numbers = np.stack(drawn).astype(np.int64)  # (n, width)
    inks, colours = [], []
    for (split, label, drawing, _), own in zip(scenes, numbers, strict=True):
        ink, colour = drawings(DRAWINGS[split])
        classes, sheets = ink.shape[:2]
        others = own[icon_render.NUMBERS :].reshape(2, -1)
        rows = (label + 1 + others[0] % (classes - 1)) % classes
        inks.append(np.concatenate([ink[label, drawing][None], ink[rows, others[1] % sheets]]))
        colours.append(colour[label, drawing])
    numbers = torch.from_numpy(numbers[:, : icon_render.NUMBERS]).to(device)
    which = torch.full((len(scenes),), icon_render.DOMAINS.index(domain), device=device)
    colours = torch.from_numpy(np.stack(colours)).permute(0, 3, 1, 2).to(device)  # (n, 4, 64, 64)
    inks = torch.from_numpy(np.stack(inks)).to(device)
    images = icon_render.draw(numbers, icon_render.plan(numbers), inks, which, colours)
    return images.permute(0, 2, 3, 1).cpu().numpy()


@DATASET_REGISTRY.register()
class IconScenesInverted(IconScenes):
    """Light drawings on dark grounds."""

    domain = "inverted"


@DATASET_REGISTRY.register()
class IconScenesColour(IconScenes):
    """Drawings of many colours: emoji and colour icons in their own, others in three bands."""

    domain = "colour"


@DATASET_REGISTRY.register()
class IconScenesPixel(IconScenes):
    """Scenes in blocks of 4 px."""

    domain = "pixel"


@DATASET_REGISTRY.register()
class IconScenesDark(IconScenes):
    """Scenes at a third of the light, with sensor noise."""

    domain = "dark"
