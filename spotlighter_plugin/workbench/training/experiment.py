"""Base-to-new experiments on cached hidden states: what the demo is made of."""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from .settings import import_trainers_and_datasets, parse, setup_cfg
from .train import set_random_seed

if TYPE_CHECKING:
    from dassl.engine import TrainerBase


@dataclass
class Method:
    """A row of a table: a registered trainer and options as on the command line.

    sees_tokens: whether it needs more of the frozen tower than what is read out in the end.
    """

    name: str
    trainer: str
    options: dict = field(default_factory=dict)
    sees_tokens: bool = True

    def flags(self) -> list[str]:
        return [str(part) for pair in self.options.items() for part in pair]


@dataclass
class Outcome:
    """What one run of a method on one data set gave.

    correct: {"base": (n,) bool, "new": (m,) bool}, image by image in the data set's order.
    """

    correct: dict[str, np.ndarray]
    parameters: int
    seconds: float

    def accuracy(self, part: str) -> float:
        """Accuracy in percent."""
        return 100 * float(self.correct[part].mean())

    @property
    def harmonic_mean(self) -> float:
        return harmonic_mean(self.accuracy("base"), self.accuracy("new"))


def harmonic_mean(base, new) -> float | np.ndarray:
    """HM = 2 base new / (base + new); 0 where both are. Numbers, or arrays of one shape."""
    return 2 * base * new / np.maximum(base + new, 1e-12)


class Laboratory:
    """Runs methods on one data set; keeps the hidden states that their frozen blocks give.

    Args:
        dataset: path of the data set's configuration file.
        root: folder of the data sets.
        block: block at which runs start, at most the methods' SELECT_BLOCK; None for whole towers and images.
        thin: look at every thin-th test image only.
        classes: the parts that are trained on and tested; ("inner-base", "inner-new") to choose options.
        say: is told what begins.
    """

    def __init__(
        self,
        dataset: str,
        root: str = "data",
        block: int | None = 1,
        classes: tuple[str, str] = ("base", "new"),
        thin: int = 1,
        say: Callable[[str], None] = lambda what: None,
    ):
        self.dataset, self.root, self.block, self.classes, self.thin = dataset, root, block, classes, thin
        self.say = say
        self.states = None
        self.modules = import_trainers_and_datasets()

    def run(self, method: Method, seed: int, log: Path | None = None) -> Outcome:
        """Train on the first part of the classes, test on both. Output goes to ``log``."""
        started = time.time()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as text:
            try:
                self.say(f"{method.name}: pictures and model")
                trained = self.trainer(method, seed, self.classes[0], folder)
                if trained.get_model_names():
                    self.say(f"{method.name}: training")
                    trained.train()
                correct = self._test_both(trained, method, seed, folder)
            finally:
                if log:
                    log.parent.mkdir(parents=True, exist_ok=True)
                    log.write_text(text.getvalue())
        models = trained._models.values()
        parameters = sum(p.numel() for model in models for p in model.parameters() if p.requires_grad)
        return Outcome(correct, parameters, time.time() - started)

    def trainer(self, method: Method, seed: int, classes: str, folder: str) -> "TrainerBase":
        """The method's trainer on cached states, ready to train or to load."""
        from dassl.engine import TRAINER_REGISTRY

        from .cached import CachedTower, HiddenStates

        flags = ["--trainer", method.trainer, "--dataset-config-file", self.dataset, "--root", self.root]
        options = {"DATASET.SUBSAMPLE_CLASSES": classes, "TEST.NO_TEST": True, "DATALOADER.TEST.BATCH_SIZE": 256}
        opts = [str(part) for pair in options.items() for part in pair]
        args = parse([*flags, "--seed", str(seed), "--output-dir", folder, *opts, *method.flags()])
        cfg = setup_cfg(args, self.modules)
        kind = TRAINER_REGISTRY.get(method.trainer)
        if self.block is not None:
            self.states = self.states or HiddenStates(cfg, self.block)
            states = self.states if method.sees_tokens else self.states.readouts
            kind = type(kind.__name__, (CachedTower, kind), {"states": states, "thin": self.thin})
        set_random_seed(seed)
        trainer = kind(cfg)
        if self.block is None and self.thin > 1:
            for loader in ["test_loader", *(["val_loader"] if _tests_twice(cfg) else [])]:
                images = getattr(trainer, loader).dataset
                few = Subset(images, range(0, len(images), self.thin))
                setattr(trainer, loader, DataLoader(few, cfg.DATALOADER.TEST.BATCH_SIZE))
        return trainer

    def _test_both(self, trained, method: Method, seed: int, folder: str) -> dict[str, np.ndarray]:
        if _tests_twice(trained.cfg):
            return {"base": self._test(trained, "val"), "new": self._test(trained, "test")}
        self.say(f"{method.name}: test, {self.classes[0]} classes")
        correct = {"base": self._test(trained)}
        self.say(f"{method.name}: test, {self.classes[1]} classes")
        other = self.trainer(method, seed, self.classes[1], folder)
        if other.get_model_names():
            other.load_model(folder, epoch=trained.max_epoch)
        return {**correct, "new": self._test(other)}

    @torch.no_grad()
    def _test(self, trainer, split: str = "test") -> np.ndarray:
        trainer.set_model_mode("eval")
        trainer.split, right = split, []  # PromptKD classifies among the split's classes
        for batch in trainer.val_loader if split == "val" else trainer.test_loader:
            images, labels = trainer.parse_batch_test(batch)
            right.append(trainer.model_inference(images).argmax(1) == labels)
        return torch.cat(right).cpu().numpy()


def _tests_twice(cfg) -> bool:
    """Whether one model has both halves: PromptKD's own protocol tests base classes in val and new ones in test."""
    from datasets.common import takes_all_classes

    return takes_all_classes(cfg)
