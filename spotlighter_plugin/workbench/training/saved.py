"""A finished run without its data: run.json, the settings, the host's checkpoint and the plug-in's state."""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from ...files import read_picture, write_aside
from ...towers.clip import weights_file
from ...wrapper import SpotlighterWrapper
from .runs import NOTE, SETTINGS
from .settings import import_trainers_and_datasets, parse, setup_cfg

PRETRAINED = "pretrained"


@dataclass
class TrainedRun:
    """A model that names what is on a picture.

    Attributes:
        trainer: the run's trainer, in evaluation mode.
        class_names: its C classes.
        preprocess: makes a tensor (3, h, w) of a picture of Pillow's, as in testing.
    """

    trainer: object
    class_names: list[str]
    preprocess: Callable

    @property
    def wrapper(self) -> SpotlighterWrapper | None:
        """The ``SpotlighterWrapper``; None in a run without Spotlighter."""
        return getattr(self.trainer, "spotlighter", None)

    def read(self, path) -> Tensor:
        """A picture's file as a tensor (3, h, w). Raises OSError, one line, for what cannot be read."""
        return self.preprocess(read_picture(path))

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Of images (B, 3, h, w): (B, C), on the CPU."""
        logits = self.trainer.model_inference(images.to(self.trainer.device))
        return logits.float().softmax(-1).cpu()


def save_run(trainer, cfg, results: dict) -> None:
    """Write run.json and the wrapper's state, if any, to ``cfg.OUTPUT_DIR``; the rest is there already."""
    folder, backbone = Path(cfg.OUTPUT_DIR), cfg.MODEL.BACKBONE.NAME
    name, best = cfg.TRAINER.NAME, cfg.TEST.FINAL_MODEL == "best_val"
    note = {
        "trainer": name,
        "host": name.removesuffix("Spotlighter"),
        "backbone": backbone,
        "backbone_sha256": digest(backbone),
        "class_names": list(trainer.dm.dataset.classnames),
        "size": list(cfg.INPUT.SIZE),
        "mean": list(cfg.INPUT.PIXEL_MEAN),
        "std": list(cfg.INPUT.PIXEL_STD),
        "epoch": None if best or not trainer.get_model_names() else trainer.max_epoch,
        "results": {key: value for key, value in results.items() if isinstance(value, (int, float))},
    }
    if hasattr(trainer, "spotlighter"):
        trainer.spotlighter.save_pretrained(folder / PRETRAINED)
    text = json.dumps(note, indent=2, ensure_ascii=False) + "\n"
    write_aside(folder / NOTE, lambda file: file.write(text.encode("utf-8", "surrogateescape")), "--output")


def digest(backbone: str) -> str | None:
    """SHA-256 of a backbone's file; None for names, whose files are checked when they are loaded."""
    path, found = weights_file(backbone), hashlib.sha256()
    if path is None:
        return None
    with open(path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def load_run(folder: str | os.PathLike, attach: bool = False) -> TrainedRun:
    """The run in a folder, which does not need its data set, wherever the folder was moved.

    Args:
        attach: put Spotlighter around a host that was trained without it; its memory learns from the run's shots, so
            these must still be there.

    Raises:
        FileNotFoundError, ValueError: no finished run is there, or what it needs is gone or has changed; one line.
    """
    folder = Path(folder)
    note = _note(folder)
    name, backbone = note["trainer"], note["backbone"]
    if attach and name.endswith("Spotlighter"):
        raise ValueError(f"{folder} was trained with Spotlighter: leave --attach out")
    if digest(backbone) not in (note["backbone_sha256"], None):
        raise ValueError(f"{folder} was trained on another backbone than {backbone} is now: train again")
    from dassl.data.transforms import build_transform
    from dassl.engine import TRAINER_REGISTRY

    modules = import_trainers_and_datasets()
    if attach:
        name = f"{name}Spotlighter"
        if name not in TRAINER_REGISTRY.registered_names():
            raise ValueError(f"there is no {name} to attach: {', '.join(hosts())} have one")
    settings = ["--trainer", name, "--config-file", str(folder / SETTINGS), "--output-dir", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()):  # what trainers say of themselves was said in training
        cfg = setup_cfg(parse(settings), modules)
        kind = TRAINER_REGISTRY.get(name)
        if not attach:
            kind = type(kind.__name__, (_WithoutData, kind), {"known": note["class_names"]})
        trainer = kind(cfg)
        if list(trainer.dm.dataset.classnames) != note["class_names"]:
            raise ValueError(f"{cfg.DATASET.ROOT} has other classes than {folder} was trained on: train again")
        if trainer.get_model_names():
            trainer.load_model(str(folder), epoch=note["epoch"])
        trainer.set_model_mode("eval")
        if attach:
            trainer._remember()
        preprocess = build_transform(cfg, is_train=False)
    return TrainedRun(trainer, note["class_names"], preprocess)


def hosts() -> list[str]:
    """Names of the trainers that have a …Spotlighter; they must have been imported."""
    from dassl.engine import TRAINER_REGISTRY

    names = TRAINER_REGISTRY.registered_names()
    return sorted(name for name in names if f"{name}Spotlighter" in names)


def _note(folder):
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of a run")
    if not (folder / NOTE).is_file():
        raise FileNotFoundError(f"{folder} has no {NOTE}: no training has ended there")
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8", errors="surrogateescape"))
        for key in ("trainer", "backbone", "backbone_sha256", "class_names", "epoch"):
            note[key]
        return note
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / NOTE} is damaged ({error}): train again") from None


class _WithoutData:
    """Put in front of a trainer: it knows its classes and has no pictures."""

    known: list[str] = []

    def build_data_loader(self):
        labels = dict(enumerate(self.known))
        dataset = SimpleNamespace(
            classnames=self.known, lab2cname=labels, num_classes=len(labels), train_x=[], train_u=[], val=[], test=[]
        )
        self.dm = SimpleNamespace(dataset=dataset, lab2cname=labels, num_classes=len(labels))
        self.train_loader_x = self.train_loader_u = self.val_loader = self.test_loader = None
        self.num_classes, self.num_source_domains, self.lab2cname = len(labels), 0, labels
