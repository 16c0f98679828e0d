"""A folder of your own: a folder of pictures for each class, or such folders in train/, val/ and test/.

Nothing is ever written there. What is missing of val/ and test/ is drawn from the training pictures by the seed.
"""

import os
import random
from pathlib import Path

from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from rich.progress import track

from spotlighter_plugin.files import pictures_below, read_picture

from .common import splits_of_the_protocol

PARTS = ("train", "val", "test")
FIFTH = 5  # of a class's pictures, one in so many to validate and as many to test


@DATASET_REGISTRY.register()
class Pictures(DatasetBase):
    """The class folders in ``DATASET.ROOT``, sorted; a class is called as its folder, underscores read as spaces.

    Of each class a fifth tests, a fifth validates, and ``DATASET.NUM_SHOTS`` readable pictures of the rest train; below
    1 all of the rest.

    Raises:
        FileNotFoundError, ValueError: no such folder, fewer than two classes, a class without readable pictures.
    """

    def __init__(self, cfg):
        root = Path(os.path.expanduser(cfg.DATASET.ROOT)).absolute()
        parts, shots = class_pictures(root), cfg.DATASET.NUM_SHOTS
        train, val, test = [], [], []
        for label, folder in enumerate(track(parts["train"], "Pictures: reading shots")):
            rng = random.Random(f"{cfg.SEED} {folder}" if cfg.SEED >= 0 else None)
            mine = _divided({part: parts[part].get(folder, []) for part in parts}, rng)
            mine["train"] = _readable(mine["train"], shots, folder)
            if shots >= 1:
                mine["val"] = mine["val"][: min(shots, 4)]
            for part, items in zip(PARTS, (train, val, test), strict=True):
                items += [Datum(str(path), label, 0, spoken(folder)) for path in mine[part]]
        if not test:
            raise ValueError(f"{root}: no class has a second picture to test on")
        train, val, test = splits_of_the_protocol(cfg, train, val, test)
        super().__init__(train_x=train, val=val, test=test)


def class_pictures(root: Path) -> dict[str, dict[str, list[Path]]]:
    """{"train": {class folder: its pictures}}, and "val" and "test" where there are such folders."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder of pictures")
    names = _folders(root)
    apart = "train" in names and set(names) <= set(PARTS) and bool(_folders(root / "train"))
    homes = {part: root / part for part in PARTS if part in names} if apart else {"train": root}
    parts = {part: {name: pictures_below(home / name) for name in _folders(home)} for part, home in homes.items()}
    classes = parts["train"]
    if len(classes) < 2:
        found = f"one class only, {next(iter(classes))!r}" if classes else "no class folders"
        raise ValueError(f"{homes['train']} has {found}: put each class's pictures into a folder of their own")
    for part in parts:
        if unknown := sorted(parts[part].keys() - classes.keys()):
            raise ValueError(f"{homes[part] / unknown[0]}: no class of that name in {homes['train']}")
    for name, pictures in classes.items():
        if not pictures:
            raise ValueError(f"{homes['train'] / name} has no picture: put some there or take the folder away")
    return parts


def spoken(folder: str) -> str:
    """A class's name as one would say it."""
    return " ".join(folder.replace("_", " ").split()) or folder


def _folders(home):
    return sorted(each.name for each in home.iterdir() if each.is_dir() and not each.name.startswith("."))


def _divided(given, rng):
    """A class's pictures by part; what is missing is drawn from those for training, at least one of them to test."""
    rest = rng.sample(given["train"], len(given["train"]))
    fifth = len(rest) // FIFTH
    parts = dict.fromkeys(PARTS, ())
    for part, count in (("test", max(fifth, len(rest) > 1)), ("val", fifth)):
        parts[part] = given[part] if part in given else rest[:count]
        rest = rest if part in given else rest[count:]
    return parts | {"train": rest}


def _readable(paths, shots, folder):
    """The first pictures that can be read, as many as there are shots; below 1 shot all, if one can be read."""
    kept, reasons = [], []
    for i, path in enumerate(paths):
        try:
            read_picture(path)
        except OSError as error:
            reasons.append(str(error))
            continue
        kept.append(path)
        if shots < 1:
            kept += paths[i + 1 :]
        if len(kept) >= shots:
            break
    if not kept:
        raise ValueError(f"class {folder!r}: none of its {len(paths)} training pictures can be read ({reasons[0]})")
    for reason in reasons:
        print(f"Left out: {reason}")
    return kept
