"""Hosts trained on a task's shots, from what the frozen tower sees, and their texts for any list of classes."""

import contextlib
import io
import tempfile
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from clip.model import VisionTransformer
from dassl.data.datasets import Datum
from dassl.engine import TRAINER_REGISTRY
from dassl.utils import set_random_seed
from torch import Tensor, nn

from ...method.losses import text_regularisation
from ...trainer import hand_written_texts
from ..training.cached import CachedLoader, keep_tail
from .tasks import FrozenTower, Scenes, Task, chunks, configuration

LENGTHS, SHORT, RATES = (5, 15, 50), (2, 5, 15), (0.003, 0.01, 0.03)  # epochs without and with tokens, learning rates
RATE, EPOCHS, SIZE = "OPTIM.LR", "OPTIM.MAX_EPOCH", "DATALOADER.TRAIN_X.BATCH_SIZE"
COMMON = {
    "OPTIM.NAME": "sgd", "OPTIM.LR_SCHEDULER": "cosine", "OPTIM.WARMUP_EPOCH": 0, SIZE: 128,
    "DATALOADER.TEST.BATCH_SIZE": 256, "DATALOADER.NUM_WORKERS": 0, "TRAIN.PRINT_FREQ": 1000,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A host and how it is trained.

    Attributes:
        trainer: as registered. options: of every training. grid: rates and lengths that tuning compares, without tokens
            and, with the plug-in, with them.
        keeps_tower: whether the vision tower stays as it is, so that what it sees can be kept.
        student: the backbone of a host that a teacher on the data set's own backbone distils, from pictures of all
            classes without labels; "" for other hosts.
    """

    trainer: str
    options: dict
    grid: tuple[dict, ...]
    grid_with_tokens: tuple[dict, ...]
    keeps_tower: bool = False
    student: str = ""

    @property
    def backbone(self) -> dict:
        """The option that names the backbone, where it is not the data set's own."""
        return {"MODEL.BACKBONE.NAME": self.student} if self.student else {}


def rates(lengths) -> tuple[dict, ...]:
    return tuple({RATE: rate, EPOCHS: n} for n in lengths for rate in RATES)


def kind_of(host: str) -> Kind:
    """A host by its short name; raises ValueError for an unknown one."""
    if host in KEEPERS:
        warm = {"OPTIM.WARMUP_EPOCH": 1, "OPTIM.WARMUP_TYPE": "constant", "OPTIM.WARMUP_CONS_LR": 1e-5}
        options = {**warm, "TRAINER.COOP.PREC": "fp32", "TRAINER.COOP.CTX_INIT": "a photo of a"}
        return Kind(KEEPERS[host], options, rates(LENGTHS), rates(SHORT), True)
    if host not in TUNED:
        raise ValueError(f"--host {host}: take one of {', '.join([*KEEPERS, *TUNED])}")
    trainer, tries = TUNED[host]
    grid = tuple({RATE: rate, EPOCHS: n, SIZE: size} for rate, n, size in tries)
    options, student = {f"TRAINER.{trainer.upper()}.PREC": "amp"}, STUDENT if trainer == "PromptKD" else ""
    return Kind(trainer, {**options, **(DISTILLED if student else {})}, grid, grid, student=student)


KEEPERS = {"coop": "CoOp", "kgcoop": "KgCoOp"}  # hosts that leave the vision tower as it is
TUNED = {  # hosts that train the vision tower: their trainer; rate, epochs and batch size of each try
    "maple": ("MaPLe", ((0.04, 2, 32), (0.02, 1, 16), (0.02, 3, 16), (0.01, 3, 16))),
    "clipfit": ("CLIPFit", ((0.01, 2, 32), (0.01, 1, 16), (0.02, 2, 32), (0.005, 3, 16))),
    "promptkd": ("PromptKD", ((0.003, 3, 16), (0.01, 3, 16), (0.003, 6, 32), (0.01, 6, 32))),
}
STUDENT = "micro"
DISTILLED = {"OPTIM.NAME": "adam", "TRAINER.MODAL": "base2novel", "TRAINER.PROMPTKD.KD_WEIGHT": 1000.0}
TEACHER = "PromptSRC", {
    RATE: 0.02, EPOCHS: 2, SIZE: 32, "TRAINER.PROMPTSRC.PREC": "amp", "TRAINER.PROMPTSRC.TEXT_LOSS_WEIGHT": 1,
}  # fmt: skip


LOOKS, PICTURES = "looks", "pictures"


@dataclass(frozen=True)
class View:
    """What a model gets of pictures.

    Attributes:
        block: the states that enter this block; LOOKS: CLS features; PICTURES: the pictures themselves.
    """

    tower: FrozenTower
    block: int | str

    def of(self, paths: list[str]) -> Tensor:
        """(n, 1+N, w), (n, d) or (n, 3, h, w)."""
        if self.block == PICTURES:
            return self.tower.pictures(paths)
        return self.tower.features(paths) if self.block == LOOKS else self.tower.states(paths, self.block)

    def start(self, model: nn.Module) -> nn.Module:
        """Let the model's vision tower take what ``of`` gives in the place of images."""
        if self.block == PICTURES:
            return model
        vision = next(module for module in model.modules() if isinstance(module, VisionTransformer))
        if self.block == LOOKS:
            vision.forward = lambda features: features
        else:
            keep_tail(vision, self.block)
        return model


class OnTask:
    """In front of a trainer: it learns from a task's shots, through a view."""

    task: Task
    view: View

    def build_data_loader(self) -> None:
        task, loaders = self.task, self.cfg.DATALOADER
        self.train_items, held_out = _items(task.shots, task.names), _items(task.held_out, task.names)
        self.train_loader_x = CachedLoader(self.view, self.train_items, loaders.TRAIN_X.BATCH_SIZE, True)
        self.val_loader = self.test_loader = CachedLoader(self.view, held_out, loaders.TEST.BATCH_SIZE, False)
        self.train_loader_u, self.num_classes, self.num_source_domains = None, task.known, 0
        names = task.names[: task.known]
        self.lab2cname = dict(enumerate(names))
        data = SimpleNamespace(
            classnames=names, lab2cname=self.lab2cname, num_classes=task.known, train_x=self.train_items, val=held_out,
            test=[],
        )  # fmt: skip
        self.dm = SimpleNamespace(dataset=data, num_classes=task.known)

    def shot_loader(self) -> CachedLoader:
        return CachedLoader(self.view, self.train_items, self.cfg.DATALOADER.TEST.BATCH_SIZE, is_train=False)

    def build_model(self) -> None:
        super().build_model()
        self.view.start(self.model)


class TextRegularised:
    """A host with L_reg_text of Eq. 14, and nothing else."""

    weight: float

    def before_train(self) -> None:
        self.reference = hand_written_texts(self.cfg, self.dm.dataset.classnames, self.device)  # t⁰ (C, d)
        super().before_train()

    def objective(self, images, labels) -> tuple[Tensor, dict]:
        loss, summary = super().objective(images, labels)
        return loss + self.weight * text_regularisation(self.model.text_features(), self.reference), summary


@dataclass
class Host:
    """A trained host, for any list of classes.

    Attributes:
        trainer: as registered. state: of what it registers, without the plug-in. plugin: the plug-in's, if it has one.
        trained: how many numbers were trained, the plug-in's among them.
        keeps_tower: whether the vision tower is CLIP's own.
    """

    trainer: str
    cfg: object
    state: dict
    trained: int
    plugin: dict
    keeps_tower: bool
    _seen: dict = field(default_factory=dict)
    _texts: dict = field(default_factory=dict)

    def model(self, names: list[str], device) -> nn.Module:
        """Whole, in evaluation mode."""
        from trainers.host import load_backbone, load_weights

        kind = TRAINER_REGISTRY.get(self.trainer)
        like = object.__new__(kind)  # a trainer that trains nothing
        like.cfg, like.device = self.cfg, torch.device(device)
        with contextlib.redirect_stdout(io.StringIO()):
            clip_model = load_backbone(self.cfg, self.cfg.TRAINER[kind.options].PREC).requires_grad_(False)
            model = like.make_model(clip_model, list(names)).to(device).eval()
        load_weights(like.registered(model), self.state, f"the state of {self.trainer}")
        return model

    @torch.no_grad()
    def looks(self, scenes: Scenes, tower: FrozenTower) -> Tensor:
        """CLS of its own vision tower, (n, d) float32 of unit length."""
        if self.keeps_tower:
            return tower.features(scenes.paths)
        new = [path for path in dict.fromkeys(scenes.paths) if path not in self._seen]
        model = self.model(["nothing"], tower.device) if new else None
        for part in chunks(new):
            looks = F.normalize(model.encode_image(tower.pictures(part)).float(), dim=-1)
            self._seen |= zip(part, looks.cpu(), strict=True)
        return torch.stack([self._seen[path] for path in scenes.paths]).to(tower.device)

    @torch.no_grad()
    def taught(self, scenes: Scenes, names: list[str], tower: FrozenTower) -> Scenes:
        """The same pictures with the classes that the host's teacher sees in them."""
        teacher = self.model(names, tower.device).teacher
        labels = [teacher(tower.pictures(part)).argmax(1).cpu() for part in chunks(scenes.paths)]
        return Scenes(scenes.paths, torch.cat(labels))

    @torch.no_grad()
    def texts(self, names: list[str], device) -> Tensor:
        """(C, d), unit length, float32."""
        key = tuple(names)
        if key not in self._texts:
            self._texts[key] = self.model(names, device).text_features().float()
        return self._texts[key]


def train(
    task: Task, view: View, trainer: str, dataset: str, seed: int, root: str, options: dict, parts=(), keeps_tower=True
) -> Host:
    """Train a registered trainer on the task's shots; ``parts`` are classes to put in front of it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        cfg = configuration(dataset, seed, root, trainer, {**COMMON, **options}, folder)
        kind = TRAINER_REGISTRY.get(trainer)
        kind = type(kind.__name__, (OnTask, *parts, kind), {"task": task, "view": view})
        set_random_seed(seed)
        run = kind(cfg)
        run.train()
    states = {name: _on_cpu(model.state_dict()) for name, model in run._models.items()}
    trained = sum(p.numel() for model in run._models.values() for p in model.parameters() if p.requires_grad)
    plugin = states.pop("spotlighter", {})
    return Host(trainer.removesuffix("Spotlighter"), cfg, states[run.checkpoint], trained, plugin, keeps_tower)


def _on_cpu(state: dict) -> dict:
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def _items(scenes: Scenes, names: list[str]) -> list[Datum]:
    return [Datum(path, y, 0, names[y]) for path, y in zip(scenes.paths, scenes.labels.tolist(), strict=True)]
