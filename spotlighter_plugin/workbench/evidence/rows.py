"""The rows of the table: a name, how to make it on one data set with one seed, and the grid that it is tuned over.

Every row is tuned on a miniature of the task that is made of base classes alone: half of them play new, their
validation pictures are the test. Heads are tuned twice: for the harmonic mean of own halves and, in rows that end in
OPEN, for that in one label space.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from ...config import SpotlighterConfig, from_cfg
from ...towers.clip import encode_prompts
from . import heads
from .hosts import Host, TextRegularised, View, train
from .judge import Answers, Exam, answers_of, figures
from .plugin import Attached, attach, first_hooked, measure
from .tasks import FrozenTower, Scenes, Task, configuration, written_aside

OPEN = ", open"
LENGTHS, SHORT, RATES = (3, 10, 30), (2, 5, 15), (0.03, 0.1, 0.3)  # epochs without and with tokens, learning rates
WEIGHTS = (20.0, 5.0, 1.0)  # of L_reg_text


class Fitted(Protocol):
    def answers(self, scenes: Scenes, tower: FrozenTower) -> Answers: ...


@dataclass
class Made:
    """A row on one data set with one seed.

    Attributes:
        fitted: answers pictures. trained: numbers trained. megabytes: what is kept beside the host.
        share: operations as a share of the host's. chosen: the setting that tuning chose.
    """

    fitted: Fitted
    trained: int = 0
    megabytes: float = 0.0
    share: float = 1.0
    chosen: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """settings: what a kept result of this row depends on, beside tower, data set and seed."""

    name: str
    make: Callable[["Cell"], Made]
    settings: object = ""


@dataclass
class HeadFit:
    """A head that has learned, on a host's texts or without one."""

    head: heads.Head
    state: dict
    texts: heads.Texts
    known: int
    host: Host | None

    def answers(self, scenes: Scenes, tower: FrozenTower) -> Answers:
        logits = self.head.logits(self.state, tower.features(scenes.paths), self.texts)
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
        dataset: str,
        seed: int,
        root: str,
        task: Task,
        tower: FrozenTower,
        folder: Path,
        first: "Cell | None" = None,
    ):
        self.dataset, self.seed, self.root = dataset, seed, root
        self.task, self.tower, self.folder, self.first = task, tower, folder, first or self
        self._texts = {}

    @cached_property
    def mini(self) -> Task:
        return self.task.miniature()

    def train(self, task: Task, trainer: str, options: dict, parts=(), block=None) -> Host:
        return train(task, View(self.tower, block), trainer, self.dataset, self.seed, self.root, options, parts)

    def tuned(self, name: str, grid, make: Callable[["Cell", Task, dict], Fitted]) -> tuple[dict, Fitted]:
        """The setting with the best harmonic mean on the first cell's miniature, and what it gives on the task."""
        first = self.first
        kept = self.folder / f"{self.tower.fingerprint}-{self.tower.dataset}-{first.seed}-{name}.json"
        written = json.loads(kept.read_text()) if kept.exists() else {}
        if written.get("grid") != list(grid):
            means = [first.means(make(first, first.mini, setting))[0] for setting in grid]
            written = {"grid": list(grid), "means": means}
            with written_aside(kept) as aside:
                aside.write_text(json.dumps(written))
        best = grid[written["means"].index(max(written["means"]))]
        return best, make(self, self.task, best)

    def means(self, fitted: Fitted) -> tuple[float, float]:
        """HM of own halves and in one label space, on the miniature."""
        test = self.mini.test
        result = figures(fitted.answers(test, self.tower), Exam(test.labels.numpy(), self.mini.known))
        return result["hm"], result["one_space_hm"]

    @cached_property
    def host(self) -> tuple[dict, Host, Host]:
        """CoOp at its best rate and length: the setting, trained on the miniature, and on the task."""
        best, fitted = self.tuned("CoOp", _rates(LENGTHS), _trained("CoOp"))
        return best, self.train(self.mini, "CoOp", best), fitted.host

    def texts(self, host: Host | None, task: Task) -> heads.Texts:
        """The host's texts (those of the hand-written prompt where there is none) beside those of frozen CLIP."""
        from datasets.templates import ensemble, prompt

        if len(task.names) not in self._texts:
            templates = (prompt(self.tower.dataset), *ensemble(self.tower.dataset))
            plain, *every = (
                encode_prompts(
                    self.tower.clip, [template.format(name.replace("_", " ")) for name in task.names]
                ).float()
                for template in templates
            )
            self._texts[len(task.names)] = plain, F.normalize(torch.stack(every).mean(0), dim=-1)
        plain, mean = self._texts[len(task.names)]
        texts = plain if host is None else host.texts(task.names, self.tower.device)
        return heads.Texts(texts, plain, mean, self.tower.clip.logit_scale.exp().item())

    def head_on(self, host: Host | None, task: Task, name: str, setting: dict | None = None, texts=None) -> HeadFit:
        """A head fitted to a task's shots."""
        head, shots = heads.HEADS[name], task.shots
        if head.sees_all:
            shots = Scenes(shots.paths + task.others.paths, torch.cat([shots.labels, task.others.labels]))
        texts = texts or self.texts(host, task)
        features, labels = self.tower.features(shots.paths), shots.labels.to(self.tower.device)
        return HeadFit(head, head.fit(features, labels, texts, task.known, **(setting or {})), texts, task.known, host)


def rows(host: str = "CoOp") -> list[Row]:
    """All rows of a host, in the table's order."""
    memory = ("cache", "whitened cache", "Gaussian classifier", "kernel ridge")
    return [
        Row("zero-shot", _zero_shot("zero-shot")),
        Row("zero-shot + templates", _zero_shot("zero-shot + templates")),
        Row(host, _host, _rates(LENGTHS)),
        Row(f"{host} + L_reg_text", _regularised, (WEIGHTS, LENGTHS)),
        *(
            Row(f"{host} + {name}{suffix}", _tuned_head(name, suffix), heads.HEADS[name].grid)
            for suffix in ("", OPEN) for name in ("text residual", "templates", *memory)
        ),
        Row("linear probe, shots of all classes", _tuned_head("linear probe", ""), heads.HEADS["linear probe"].grid),
        Row(f"{host} + TextRefiner", _released(False), _rates(SHORT)),
        Row(f"{host} + Spotlighter, as released", _released(True), _rates(SHORT)),
        Row(f"{host} + Spotlighter, paper", _trained_with(preset="paper"), _settings(preset="paper")),
        Row(f"{host} + Spotlighter, random tokens", _attached(activation="random"), _settings(activation="random")),
        Row(f"{host} + Spotlighter", _attached(), _settings()),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- how rows are made


def _zero_shot(name: str):
    return lambda cell: Made(cell.head_on(None, cell.task, name))


def _host(cell: Cell) -> Made:
    best, _, host = cell.host
    return Made(cell.head_on(host, cell.task, "host"), host.trained, chosen=best)


def _tuned_head(name: str, suffix: str):
    def make(cell: Cell) -> Made:
        _, small, host = cell.host
        texts, head = cell.texts(small, cell.mini), heads.HEADS[name]
        which = 1 if suffix == OPEN else 0
        means = [cell.means(cell.head_on(small, cell.mini, name, setting, texts))[which] for setting in head.grid]
        best = head.grid[means.index(max(means))]
        fitted = cell.head_on(host, cell.task, name, best)
        trained = sum(v.numel() for v in fitted.state.values()) if name in ("text residual", "linear probe") else 0
        return Made(fitted, host.trained + trained, heads.megabytes(fitted.state), chosen=best)

    return make


def _trained(trainer: str, parts: Callable[[dict], tuple] = lambda setting: ()):
    """How a host is trained with a setting of its grid; what is no option goes to its ``parts``."""

    def make(cell: Cell, task: Task, setting: dict) -> HeadFit:
        options = {name: value for name, value in setting.items() if name.isupper()}
        host = cell.train(task, trainer, options, parts(setting))
        return cell.head_on(host, task, "host")

    return make


def _regularised(cell: Cell) -> Made:
    grid = tuple({"weight": w, "OPTIM.LR": RATES[1], "OPTIM.MAX_EPOCH": n} for n in LENGTHS for w in WEIGHTS)
    part = lambda setting: (type("Regularised", (TextRegularised,), {"weight": setting["weight"]}),)  # noqa: E731
    best, fitted = cell.tuned("L_reg_text", grid, _trained("CoOp", part))
    return Made(fitted, fitted.host.trained, chosen=best)


def _released(image_branch: bool):
    def make(cell: Cell, task: Task, setting: dict) -> ReleasedFit:
        last = len(cell.tower.vision.transformer.resblocks) - 1
        options = {**setting, "TRAINER.RELEASED.IMAGE_BRANCH": image_branch}
        return ReleasedFit(cell.train(task, "CoOpReleased", options, block=last), task)

    def row(cell: Cell) -> Made:
        best, fitted = cell.tuned("released" if image_branch else "TextRefiner", _rates(SHORT), make)
        memory = fitted.host.state["refiner.memory"]
        return Made(fitted, fitted.host.trained, memory.numel() * 4 / 1e6, chosen=best)

    return row


def _attached(**options):
    """Spotlighter on the trained host: nothing more is trained."""

    def make(cell: Cell) -> Made:
        best, _, host = cell.host
        fitted = attach(host, SpotlighterConfig(**options), cell.task, cell.tower)
        share, megabytes = measure(fitted, cell.tower)
        return Made(fitted, host.trained, megabytes, share, best)

    return make


def _trained_with(**options):
    """Spotlighter trained together with the host."""
    given = {f"TRAINER.SPOTLIGHTER.{name.upper()}": value for name, value in options.items()}

    def make(cell: Cell, task: Task, setting: dict) -> Attached:
        config = from_cfg(configuration(cell.dataset, cell.seed, cell.root, "CoOpSpotlighter", given))
        untrained = Attached(cell.host[2], config, cell.task, {}, 0)
        block = first_hooked(untrained.wrapper(cell.task.names[: cell.task.known], cell.tower.device))
        host = cell.train(task, "CoOpSpotlighter", {**given, **setting}, block=block)
        return attach(host, config, task, cell.tower)

    def row(cell: Cell) -> Made:
        name = "-".join(["Spotlighter", *map(str, options.values())])
        best, fitted = cell.tuned(name, _rates(SHORT), make)
        share, megabytes = measure(fitted, cell.tower)
        return Made(fitted, fitted.host.trained, megabytes, share, best)

    return row


def _rates(lengths) -> tuple[dict, ...]:
    return tuple({"OPTIM.LR": rate, "OPTIM.MAX_EPOCH": n} for n in lengths for rate in RATES)


def _settings(**options) -> dict:
    return asdict(SpotlighterConfig(**options))
