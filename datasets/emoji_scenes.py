"""EmojiScenes, the bundled benchmark: a family of five data sets of real drawings that pre-training never saw.

Scenes are pure functions of (split, class, vendor, number), drawn by ``emoji_render`` and written once as PNG under
``<root>/emoji_scenes/<domain>/<split>/<class>/``; only those that a run asks for are written. The first 164 classes are
base, the other 163 new.
"""

import os
import random
from pathlib import Path

from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from PIL import Image
from rich.progress import track

from .common import splits_of_the_protocol, takes_all_classes
from .emoji_render import concepts, render_scene

SPLIT_SEEDS = {"train": 1, "val": 2, "test": 3}
TRAIN_POOL, VAL_SCENES, TEST_SCENES = 32, 8, 20  # scenes of each class


@DATASET_REGISTRY.register()
class EmojiScenes(DatasetBase):
    """Clean scenes; 327 classes, vendors twemoji and noto-v1 in every split.

    ``DATASET.NUM_SHOTS`` scenes a class are drawn from a pool of 32 by ``SEED``; more than 32 is a ValueError, below 1
    takes the pool. ``DATASET.SUBSAMPLE_CLASSES`` is all, base or new, as for every data set, or inner-base or
    inner-new: the halves of the base classes, tested on their validation scenes, for choosing hyper-parameters.
    """

    domain = "normal"
    vendors = {"train": ("twemoji", "noto-v1"), "val": ("twemoji", "noto-v1"), "test": ("twemoji", "noto-v1")}

    def __init__(self, cfg):
        shots, subsample = cfg.DATASET.NUM_SHOTS, cfg.DATASET.SUBSAMPLE_CLASSES
        inner = subsample.startswith("inner")
        if shots > TRAIN_POOL:
            raise ValueError(f"DATASET.NUM_SHOTS is {shots}: EmojiScenes has {TRAIN_POOL} training scenes of a class")
        self.dataset_dir = Path(os.path.expanduser(cfg.DATASET.ROOT)).absolute() / "emoji_scenes"
        self.names = concepts()
        distilled = takes_all_classes(cfg)
        labels = self._classes("all" if distilled else subsample)
        chosen = {"val": range(VAL_SCENES), "test": range(VAL_SCENES if inner else TEST_SCENES)}
        items = []
        for new, label in enumerate(labels):
            draw = (
                random.Random(f"{cfg.SEED} {label}").sample(range(TRAIN_POOL), shots)
                if shots >= 1
                else range(TRAIN_POOL)
            )
            for split, numbers in {"train": draw, **chosen}.items():
                source = "val" if inner and split == "test" else split
                items += [(split, source, label, new, number) for number in numbers]
        self._write([(source, label, number) for _, source, label, _, number in items])
        splits = {"train": [], "val": [], "test": []}
        for split, source, label, new, number in items:
            splits[split].append(Datum(str(self._path(source, label, number)), new, 0, self.names[label]))
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

    def _vendor(self, split, number):
        return self.vendors[split][number % len(self.vendors[split])]

    def _path(self, split, label, number):
        folder = self.dataset_dir / self.domain / split / self.names[label].replace(" ", "_")
        return folder / f"{self._vendor(split, number)}_{number:03d}.png"

    def _write(self, scenes):
        missing = [scene for scene in dict.fromkeys(scenes) if not self._path(*scene).exists()]
        for split, label, number in track(missing, f"{type(self).__name__}: drawing", disable=not missing):
            path = self._path(split, label, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            scene = render_scene(SPLIT_SEEDS[split], label, self._vendor(split, number), number, self.domain)
            aside = path.with_suffix(f".{os.getpid()}.tmp")
            Image.fromarray(scene.image).save(aside, format="PNG", compress_level=1)
            os.replace(aside, path)


@DATASET_REGISTRY.register()
class EmojiScenesPixel(EmojiScenes):
    """Scenes pixelated to 3 px blocks."""

    domain = "pixelated"


@DATASET_REGISTRY.register()
class EmojiScenesDark(EmojiScenes):
    """Scenes at a fifth of the light, with sensor noise."""

    domain = "dark"


@DATASET_REGISTRY.register()
class EmojiScenesSwap(EmojiScenes):
    """Scenes whose colour channels are rotated."""

    domain = "swapped"


@DATASET_REGISTRY.register()
class EmojiScenesShift(EmojiScenes):
    """Clean scenes of three vendors: shots by one, validation by another, test by a third."""

    vendors = {"train": ("twemoji",), "val": ("noto-v1",), "test": ("fluent-emoji",)}
