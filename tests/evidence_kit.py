"""Coloured squares in two lights and a random CLIP that looks at them: a family for the table of evidence."""

from pathlib import Path

import method_kit
import numpy as np
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from PIL import Image

NAMES = ("red", "green", "blue", "yellow", "dark grey", "sea shell")
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (70, 70, 70), (230, 220, 210))
COUNTS = {"train": 4, "val": 2, "test": 5}
SIZE = 64  # pixels: 64 patches


@DATASET_REGISTRY.register()
class Tiles(DatasetBase):
    """Noisy squares of a colour: 4 for training, 2 for validation and 5 for testing of each of 6 classes."""

    light = 1.0

    def __init__(self, cfg):
        folder = Path(cfg.DATASET.ROOT, type(self).__name__)
        shots = {**COUNTS, "train": min(COUNTS["train"], cfg.DATASET.NUM_SHOTS)}
        train, val, test = (self._items(folder, split, shots[split]) for split in COUNTS)
        super().__init__(train_x=train, val=val, test=test)

    def _items(self, folder, split, count):
        items = []
        for label, (name, colour) in enumerate(zip(NAMES, COLOURS, strict=True)):
            for number in range(count):
                path = folder / split / f"{label}-{number}.png"
                if not path.exists():
                    noise = np.random.default_rng([label, number, len(split)])
                    pixels = noise.normal(colour, 60, (SIZE, SIZE, 3)) * self.light
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
                items.append(Datum(str(path), label, 0, name))
        return items


@DATASET_REGISTRY.register()
class TilesDark(Tiles):
    light = 0.4


def write_family(folder, monkeypatch) -> list[str]:
    """Configuration files of Tiles and TilesDark on a random CLIP."""
    monkeypatch.setattr(method_kit, "SIZE", SIZE)
    weights = method_kit.save_random_clip(folder / "clip.safetensors", vision=64)
    files = []
    for name in ("Tiles", "TilesDark"):
        files.append(str(folder / f"{name}.yaml"))
        Path(files[-1]).write_text(
            f'DATASET:\n  NAME: "{name}"\n  NUM_SHOTS: 4\nMODEL:\n  BACKBONE:\n    NAME: "{weights}"\n'
            f'INPUT:\n  SIZE: ({SIZE}, {SIZE})\n  TRANSFORMS: ("normalize",)\n'
            'TRAINER:\n  COOP:\n    CTX_INIT: "a photo of a"\n'
        )
    return files
