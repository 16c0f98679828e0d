"""Spotlighter's own rows: attached to a trained host or trained with it, through the wrapper's public calls."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...config import SpotlighterConfig
from ...trainer import template_texts
from ...wrapper import SpotlighterWrapper
from ..speed.stopwatch import operations
from .hosts import PICTURES, Host, View
from .judge import Answers, answers_of
from .tasks import FrozenTower, Scenes, Task, chunks

BATCH = 256  # pictures in one pass of the tower's rest
ALIKE = 0.05  # how far logits from kept states may be off those from pictures, in units of their spread


@dataclass
class Attached:
    """A host with Spotlighter, for any list of classes.

    Attributes:
        state: the wrapper's. block: where kept states enter.
    """

    host: Host
    config: SpotlighterConfig
    task: Task
    state: dict
    block: int | str
    _texts: dict = field(default_factory=dict)
    _seen: dict = field(default_factory=dict)

    def wrapper(self, names: list[str], device) -> SpotlighterWrapper:
        wrapper = SpotlighterWrapper(self.host.model(names, device), self.config, class_names=list(names)).to(device)
        if wrapper.adapter.hand_written_text:
            wrapper.adapter.set_templates(lambda: self._templates(names, device))
        if self.state:
            wrapper.load_state_dict(self.state)
        return wrapper.eval()

    def _templates(self, names, device) -> Tensor:
        """Texts of the data set's templates, encoded once."""
        key = tuple(names)
        if key not in self._texts:
            self._texts[key] = template_texts(self.host.cfg, names, device)
        return self._texts[key]

    @torch.no_grad()
    def answers(self, scenes: Scenes, tower: FrozenTower) -> Answers:
        """Base pictures among the base classes, new ones among the new, and all among all: three lists of classes."""
        one = answers_of(self._logits(self.task.names, scenes, tower), scenes.labels, self.task.known).one
        own, is_base = np.zeros(len(one), bool), (scenes.labels < self.task.known).numpy()
        for (low, high), mine in zip(self._halves(), (is_base, ~is_base), strict=True):
            some = scenes.of_classes(low, high)
            found = self._logits(self.task.names[low:high], some, tower).argmax(1)
            own[mine] = (found == some.labels - low).numpy()
        return Answers(own, one)

    def _halves(self):
        return (0, self.task.known), (self.task.known, len(self.task.names))

    def _logits(self, names, scenes: Scenes, tower: FrozenTower) -> Tensor:
        wrapper = self.wrapper(names, tower.device)
        if self.looks_alike:
            return wrapper.classify(self.embeddings(wrapper, scenes.paths, tower)).float().cpu()
        view = View(tower, self.block)
        view.start(wrapper)
        return torch.cat([wrapper(states).float().cpu() for states, _ in batches(scenes, view)])

    @property
    def looks_alike(self) -> bool:
        """Whether an image's embedding is the same whatever the texts and the shots."""
        config = self.config
        return config.mapping == "none" and not config.semantic_activation and config.activation != "lens"

    @torch.no_grad()
    def embeddings(self, wrapper: SpotlighterWrapper, paths: list[str], tower: FrozenTower) -> Tensor:
        """v of pictures as the wrapper sees them, (n, d); where the host's tower is CLIP's own, kept on disk."""
        if self.host.keeps_tower:
            way = repr((wrapper.steps, self.config.activation, self.config.fuse_dropped, self.config.seed))
            name = hashlib.blake2b(way.encode(), digest_size=4).hexdigest()
            return tower.features(paths, name, wrapper.image_embeddings)
        for part in chunks([path for path in dict.fromkeys(paths) if path not in self._seen]):
            self._seen |= zip(part, wrapper.image_embeddings(tower.pictures(part)).float(), strict=True)
        return torch.stack([self._seen[path] for path in paths])


def attach(host: Host, config: SpotlighterConfig, task: Task, learned: Task, tower: FrozenTower) -> Attached:
    """Put Spotlighter on a trained host. Unless it was trained with it, it now remembers what is to be learned, the
    task's shots as a rule."""
    attached = Attached(host, config, task, host.plugin, 0)
    wrapper = attached.wrapper(learned.names[: learned.known], tower.device)
    attached.block = first_hooked(wrapper) if host.keeps_tower else PICTURES
    if not host.plugin:
        if attached.looks_alike:
            shots = learned.shots
            wrapper.learn(attached.embeddings(wrapper, shots.paths, tower), shots.labels.to(tower.device))
        else:
            view = View(tower, attached.block)
            view.start(wrapper)
            wrapper.remember(batches(learned.shots, view))
        attached.state = {name: value.detach().cpu() for name, value in wrapper.state_dict().items()}
    return attached


@torch.no_grad()
def measure(attached: Attached, tower: FrozenTower) -> tuple[float, float]:
    """Operations as a share of the host's, and the MB (10⁶ bytes) that the plug-in keeps.

    Raises:
        RuntimeError: kept states do not give the wrapper's answers on pictures.
    """
    task = attached.task
    names, few = task.names[: task.known], task.shots.paths[:8]
    wrapper, images, view = attached.wrapper(names, tower.device), tower.pictures(few), View(tower, attached.block)
    share = share_of_operations(wrapper, attached.host.model(names, tower.device), images)
    whole = wrapper(images)
    kept = view.start(wrapper)(view.of(few).to(tower.device).float())
    is_random = attached.config.activation == "random"  # other tokens for states than for pictures
    if not is_random and (whole - kept).abs().median() > ALIKE * whole.std():
        raise RuntimeError(f"states on entering block {attached.block} do not give the answers that pictures give")
    return share, sum(v.numel() * v.element_size() for v in attached.state.values()) / 1e6


def batches(scenes: Scenes, view: View) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of what the view gives and classes, on the tower's device; labels stay on the CPU until they are used."""
    for start in range(0, len(scenes.paths), BATCH):
        states = view.of(scenes.paths[start : start + BATCH])
        yield states.to(view.tower.device).float(), scenes.labels[start : start + BATCH]


def first_hooked(wrapper: SpotlighterWrapper) -> int:
    """The first block of the vision tower with a hook: what enters it is the host's own."""
    blocks = wrapper.adapter.vision.transformer.resblocks
    hooked = (i for i, block in enumerate(blocks) if any(_has_hooks(module) for module in block.modules()))
    return next(hooked, len(blocks) - 1)


def share_of_operations(wrapper, host, images: Tensor) -> float:
    """Spotlighter's operations as a share of the host's for these images, texts kept; attention counts."""
    counted = []
    for model in (host, wrapper):
        model(images)  # texts are encoded once
        with sdpa_kernel(SDPBackend.MATH):
            counted.append(operations(lambda: model(images)))  # noqa: B023
    return counted[1] / counted[0]


def _has_hooks(module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)
