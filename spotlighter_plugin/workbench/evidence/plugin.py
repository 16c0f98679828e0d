"""Spotlighter's own rows: attached to a trained host or trained with it, through the wrapper's public calls."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...config import SpotlighterConfig
from ...wrapper import SpotlighterWrapper
from ..speed.stopwatch import operations
from .hosts import PICTURES, Host, View
from .judge import Answers
from .tasks import FrozenTower, Scenes, Task

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

    def wrapper(self, names: list[str], device) -> SpotlighterWrapper:
        wrapper = SpotlighterWrapper(self.host.model(names, device), self.config, class_names=list(names)).to(device)
        if self.state:
            wrapper.load_state_dict(self.state)
        return wrapper.eval()

    @torch.no_grad()
    def answers(self, scenes: Scenes, tower: FrozenTower) -> Answers:
        """Base pictures among the base classes, new ones among the new, and all among all: three lists of classes."""
        names, known = self.task.names, self.task.known
        view, labels = View(tower, self.block), scenes.labels
        own, is_base = np.zeros(len(labels), bool), (labels < known).numpy()
        for low, high, mine in ((0, known, is_base), (known, len(names), ~is_base)):
            if mine.any():
                some = scenes.of_classes(low, high)
                own[mine] = self._right(names[low:high], Scenes(some.paths, some.labels - low), view)
        return Answers(own, self._right(names, scenes, view))

    def _right(self, names, scenes: Scenes, view: View):
        wrapper = view.start(self.wrapper(names, view.tower.device))
        right = [wrapper(states).argmax(1).cpu() == labels for states, labels in batches(scenes, view)]
        return torch.cat(right).numpy()


def attach(host: Host, config: SpotlighterConfig, task: Task, tower: FrozenTower) -> Attached:
    """Put Spotlighter on a trained host. Unless it was trained with it, it now remembers the shots, and is weighed on
    what is held out of the known classes."""
    attached = Attached(host, config, task, host.plugin, 0)
    wrapper = attached.wrapper(task.names[: task.known], tower.device)
    attached.block = first_hooked(wrapper) if host.keeps_tower else PICTURES
    if not host.plugin:
        view = View(tower, attached.block)
        view.start(wrapper)
        wrapper.remember(batches(task.shots, view))
        wrapper.calibrate(batches(task.held_out, view))
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


def batches(scenes: Scenes, view: View):
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
