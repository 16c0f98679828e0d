"""A small IconScenes, so that tests on the bundled backbone take seconds; and scenes as anybody's pictures.

`python tests/scenes_kit.py` writes ten classes of them into photos/, and others of the same classes into others/.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import spotlighter_plugin  # noqa: E402, F401  (provides dassl, which the data sets register with)
from datasets import icon_drawings, icon_scenes  # noqa: E402


def few(concepts=6, validation=1, test=2):
    """What IconScenes' module is to hold to have this many concepts, and scenes of each for validation and testing."""
    n = {"shots": icon_scenes.SHOTS, "val": validation, "test": test}

    def drawings(split):
        return tuple(a[:, : n[split]] for a in icon_drawings.drawings(split))

    names = icon_drawings.concepts()[:concepts]
    return {"concepts": lambda: names, "drawings": drawings, "VAL_SCENES": 1, "TEST_SCENES": 1}


def fewer_scenes(monkeypatch, **counts):
    """Let IconScenes be this small."""
    for name, value in few(**counts).items():
        monkeypatch.setattr(icon_scenes, name, value)


def class_folders(folder, split="train", classes=10, drawings=16, scenes=2):
    """Write a folder of pictures for each of the first classes: scenes around its drawings of a split."""
    from PIL import Image

    keys = [(split, c, d, n) for c in range(classes) for d in range(drawings) for n in range(scenes)]
    names = icon_drawings.concepts()
    for (_, c, d, n), image in zip(keys, icon_scenes.render("source", keys), strict=True):
        path = Path(folder, names[c], f"{d:02d}_{n}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


if __name__ == "__main__":
    class_folders("photos")
    class_folders("others", "test", drawings=4, scenes=1)
