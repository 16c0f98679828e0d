"""One data set and one seed: what is learned there, tuned on a miniature of the task."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from ...files import write_aside
from ...towers.clip import encode_prompts, load_clip
from . import heads
from .hosts import LOOKS, PICTURES, TEACHER, Host, Kind, View, train
from .judge import Answers, Exam, answers_of, figures
from .tasks import FrozenTower, Scenes, Task, configuration


class Fitted(Protocol):
    def answers(self, scenes: Scenes, tower: FrozenTower) -> Answers: ...


@dataclass
class HeadFit:
    """A head that has learned, on a host's texts or without one."""

    head: heads.Head
    state: dict
    texts: heads.Texts
    known: int
    host: Host | None

    def answers(self, scenes: Scenes, tower: FrozenTower) -> Answers:
        looks = self.host.looks(scenes, tower) if self.host else tower.features(scenes.paths)
        logits = self.head.logits(self.state, looks, self.texts)
        return answers_of(logits, scenes.labels, self.known)


@dataclass
class ReleasedFit:
    """The released algorithm, which looks at no token in testing."""

    host: Host
    task: Task

    @torch.no_grad()
    def answers(self, scenes: Scenes, tower: FrozenTower) -> Answers:
        model = self.host.model(self.task.names, tower.device)
        return answers_of(model.classify(tower.features(scenes.paths)), scenes.labels, self.task.known)


class Cell:
    """One data set and one seed: the task, its miniature, and the host trained on both.

    first: the cell of the first seed, on whose miniature everything that is trained gets its rate and length; None for
        that cell itself. Heads, which cost little, are tuned by each cell.
    """

    def __init__(
        self,
        kind: Kind,
        dataset: str,
        seed: int,
        root: str,
        task: Task,
        tower: FrozenTower,
        folder: Path,
        first: "Cell | None" = None,
        shots: int = 16,
    ):
        self.kind, self.dataset, self.seed, self.root = kind, dataset, seed, root
        self.task, self.tower, self.folder, self.first = task, tower, folder, first or self
        self._texts, self._filed, self._means = {}, {}, {}
        folder.mkdir(parents=True, exist_ok=True)
        self._name = f"{tower.fingerprint}-{tower.dataset}" + (f"-{shots}shots" if shots != 16 else "")

    @cached_property
    def mini(self) -> Task:
        return self.task.miniature()

    def train(self, task: Task, setting: dict, trainer: str = "", parts=(), block: int | str = LOOKS) -> Host:
        """Train the host, or another trainer built on it, with a setting of its grid."""
        kind, where = self.kind, (self.dataset, self.seed, self.root)
        view = View(self.tower, block if kind.keeps_tower else PICTURES)
        options = {**kind.options, **{name: value for name, value in setting.items() if name.isupper()}}
        if kind.student:
            options |= {**kind.backbone, **self.teacher(task)}
            task = task.pooled
        return train(task, view, trainer or kind.trainer, *where, options, parts, kind.keeps_tower)

    def teacher(self, task: Task) -> dict:
        """The options that name the teacher of this task's known classes, trained where none is kept."""
        name, options = TEACHER
        known = f"{task.known}of{len(task.names)}"
        kept = self.folder / f"{self._name}-{self.seed}-{name}-{known}.pth"
        if not kept.exists():
            view = View(self.tower, PICTURES)
            host = train(task, view, name, self.dataset, self.seed, self.root, options, keeps_tower=False)
            state = {"state_dict": host.state, "epoch": options["OPTIM.MAX_EPOCH"]}
            write_aside(kept, lambda file: torch.save(state, file), "folder")
        backbone = configuration(self.dataset, self.seed, self.root).MODEL.BACKBONE.NAME
        return {"TRAINER.PROMPTKD.TEACHER_CHECKPOINT": kept, "TRAINER.PROMPTKD.TEACHER_NAME": backbone}

    def learned(self, host: Host | None, task: Task) -> Task:
        """What memories are made of: the task's shots, or all that a teacher labels."""
        if host is None or not self.kind.student:
            return task
        key = id(host), len(task.names)
        if key not in self._filed:
            pooled = task.pooled
            self._filed[key] = host, replace(pooled, shots=host.taught(pooled.shots, task.names, self.tower))
        return self._filed[key][1]

    def tuned(self, name: str, grid, make: Callable[["Cell", Task, dict], Fitted]) -> tuple[dict, Fitted]:
        """The setting with the best harmonic mean on the first cell's miniature, and what it gives on the task."""
        first = self.first
        kept = self.folder / f"{self._name}-{first.seed}-{self.kind.trainer}-{name}.json"
        written = json.loads(kept.read_text()) if kept.exists() else {}
        if written.get("grid") != list(grid):
            means = [first.means(make(first, first.mini, setting))[0] for setting in grid]
            written = {"grid": list(grid), "means": means}
            write_aside(kept, lambda file: file.write(json.dumps(written).encode()), "folder")
        best = grid[written["means"].index(max(written["means"]))]
        return best, make(self, self.task, best)

    def means(self, fitted: Fitted) -> tuple[float, float]:
        """HM of own halves and in one label space, on the miniature."""
        test = self.mini.test
        result = figures(fitted.answers(test, self.tower), Exam(test.labels.numpy(), self.mini.known))
        return result["hm"], result["one_space_hm"]

    def means_of(self, name: str) -> list[tuple[float, float]]:
        """``means`` of a head at each setting of its grid."""
        if name not in self._means:
            small, texts = self.host[1], self.texts(self.host[1], self.mini)
            fits = (self.head_on(small, self.mini, name, setting, texts) for setting in heads.HEADS[name].grid)
            self._means[name] = [self.means(fit) for fit in fits]
        return self._means[name]

    @cached_property
    def host(self) -> tuple[dict, Host, Host]:
        """The host at its best rate and length: the setting, trained on the miniature, and on the task."""
        make = lambda cell, task, setting: cell.head_on(cell.train(task, setting), task, "host")  # noqa: E731
        best, fitted = self.tuned("host", self.kind.grid, make)
        return best, self.train(self.mini, best), fitted.host

    def texts(self, host: Host | None, task: Task) -> heads.Texts:
        """The host's texts (those of the hand-written prompt where there is none) beside those of frozen CLIP."""
        from datasets.templates import ensemble, prompt

        key = len(task.names), host is None
        if key not in self._texts:
            taught = host is not None and self.kind.student
            clip = load_clip(host.cfg.TRAINER.PROMPTKD.TEACHER_NAME, self.tower.device) if taught else self.tower.clip
            templates = (prompt(self.tower.dataset), *ensemble(self.tower.dataset))
            plain, *every = (
                encode_prompts(clip, [template.format(name.replace("_", " ")) for name in task.names]).float()
                for template in templates
            )
            self._texts[key] = plain, F.normalize(torch.stack(every).mean(0), dim=-1)
        plain, mean = self._texts[key]
        texts = plain if host is None else host.texts(task.names, self.tower.device)
        return heads.Texts(texts, plain, mean, self.tower.clip.logit_scale.exp().item())

    def head_on(self, host: Host | None, task: Task, name: str, setting: dict | None = None, texts=None) -> HeadFit:
        """A head fitted to a task's shots."""
        head, learned = heads.HEADS[name], self.learned(host, task)
        shots = task.pooled.shots if head.sees_all else learned.shots
        texts = texts or self.texts(host, task)
        looks = host.looks(shots, self.tower) if host else self.tower.features(shots.paths)
        state = head.fit(looks, shots.labels.to(self.tower.device), texts, learned.known, **(setting or {}))
        return HeadFit(head, state, texts, task.known, host)
