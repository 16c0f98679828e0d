"""Frozen blocks run once: hidden states on entering block s are kept per image, and trainers start from there.

Where a host trains nothing before block s and images are not augmented (IconScenes' setting), every epoch computes the
same hidden states. ``CachedTower`` makes any such trainer, with or without Spotlighter, read them instead of pictures;
its numbers are the plain trainer's up to the half precision in which states are kept.
"""

import os
import traceback
from contextlib import redirect_stderr, redirect_stdout

import torch
from clip.model import VisionTransformer
from dassl.data.transforms import build_transform
from dassl.engine import TRAINER_REGISTRY, TrainerBase
from rich.progress import track
from torch import Tensor, nn

from ...config import from_cfg
from ...files import read_picture
from ...towers.clip import load_clip
from ...trainer import SpotlighterTrainerMixin
from ...wrapper import SpotlighterWrapper
from . import train as training


class HiddenStates:
    """Hidden states (1+N, w) of images where they enter ``block``; for ``block`` = L only what is read out, (1, w).

    Args:
        cfg: names the backbone and the images' transforms, which may not be random.
        block: s in [0, L]; negative counts from the end.
        batch_size: images in one pass of the tower.
    """

    def __init__(self, cfg, block: int, batch_size: int = 128):
        if set(cfg.INPUT.TRANSFORMS) - {"normalize", "center_crop"}:
            raise ValueError(
                f"INPUT.TRANSFORMS {list(cfg.INPUT.TRANSFORMS)}: states of augmented images cannot be kept; "
                "set INPUT.TRANSFORMS \"('normalize',)\""
            )
        self.transform, self.batch_size = build_transform(cfg, is_train=False), batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() and cfg.USE_CUDA else "cpu")
        self.vision = load_clip(cfg.MODEL.BACKBONE.NAME, self.device).visual.eval()
        n_blocks = len(self.vision.transformer.resblocks)
        self.block = block + n_blocks if block < 0 else block
        self.rows, self.states = {}, []
        self.readouts = Readouts(self, n_blocks)

    def of(self, paths: list[str]) -> Tensor:
        """(n, 1+N, w) half precision; each image is read and computed once."""
        self.compute(paths)
        return torch.stack([self.states[chunk][i] for chunk, i in (self.rows[path] for path in paths)])

    @torch.no_grad()
    def compute(self, paths: list[str]) -> None:
        """Compute what is not there yet: the states, and in the same pass what is read out."""
        new = [path for path in dict.fromkeys(paths) if path not in self.rows]
        starts = range(0, len(new), self.batch_size)
        for start in track(starts, "frozen blocks", disable=not new, transient=True):
            part = new[start : start + self.batch_size]
            images = torch.stack([self.transform(read_picture(path)) for path in part]).to(self.device)  # (b, 3, h, w)
            self.rows |= {path: (len(self.states), i) for i, path in enumerate(part)}
            for kept, states in zip((self.states, self.readouts.states), self._enter(images), strict=True):
                kept.append(states.permute(1, 0, 2).half().cpu())

    def _enter(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 3, h, w) → (1+N, b, w) entering the block, and (1, b, w) leaving the last one."""
        transformer, caught = self.vision.transformer, {}
        hooks = [transformer.register_forward_hook(lambda module, args, out: caught.update(out=out[:1]))]
        if self.block < len(transformer.resblocks):
            entered = transformer.resblocks[self.block]
            hooks.append(entered.register_forward_pre_hook(lambda module, args: caught.update(x=args[0])))
        self.vision(images)
        for hook in hooks:
            hook.remove()
        return caught.get("x", caught["out"]), caught["out"]


class Readouts:
    """What a tower reads out, (n, 1, w), for trainers that look at no tokens; kept beside a tower's hidden states."""

    def __init__(self, source: HiddenStates, n_blocks: int):
        self.source, self.block, self.states = source, n_blocks, []

    def of(self, paths: list[str]) -> Tensor:
        """(n, 1, w) half precision."""
        self.source.compute(paths)
        return torch.stack([self.states[chunk][i] for chunk, i in (self.source.rows[path] for path in paths)])


class CachedLoader:
    """Batches {img, label, impath} of cached states; shuffled by the global generator, whole batches, in training."""

    def __init__(self, states: HiddenStates, items, batch_size: int, is_train: bool):
        self.states, self.images = states, None
        self.labels = torch.tensor([item.label for item in items])
        self.paths = [item.impath for item in items]
        self.batch_size, self.is_train = min(batch_size, len(items)) if is_train else batch_size, is_train

    def __len__(self):
        n, size = len(self.labels), self.batch_size
        return n // size if self.is_train else -(-n // size)

    def __iter__(self):
        n = len(self.labels)
        if self.images is None:  # not before they are asked for: an evaluation needs none of the training images
            self.images = self.states.of(self.paths)  # (n, 1+N, w)
        order = torch.randperm(n) if self.is_train else torch.arange(n)
        for index in order.split(self.batch_size)[: len(self)]:
            paths = [self.paths[i] for i in index.tolist()]
            yield {"img": self.images[index].float(), "label": self.labels[index], "impath": paths}


class CachedTower:
    """Put in front of a trainer: ``type("Fast", (CachedTower, CoOp), {"states": HiddenStates(cfg, 5)})``."""

    states: HiddenStates
    thin = 1  # every thin-th test image is looked at

    def build_data_loader(self) -> None:
        super().build_data_loader()
        dm, loaders = self.dm, self.cfg.DATALOADER
        self.train_loader_x = CachedLoader(self.states, dm.dataset.train_x, loaders.TRAIN_X.BATCH_SIZE, True)
        self.val_loader = CachedLoader(self.states, dm.dataset.val, loaders.TEST.BATCH_SIZE, False)
        self.test_loader = CachedLoader(self.states, dm.dataset.test[:: self.thin], loaders.TEST.BATCH_SIZE, False)

    def shot_loader(self) -> CachedLoader:
        size = self.cfg.DATALOADER.TEST.BATCH_SIZE
        return CachedLoader(self.states, self.dm.dataset.train_x, size, is_train=False)

    def build_model(self) -> None:
        super().build_model()
        model = getattr(self, "model", None) or self.clip_model  # zero-shot CLIP has no model of its own
        vision = next(module for module in model.modules() if isinstance(module, VisionTransformer))
        optims = [optim for optim in self._optims.values() if optim is not None]
        trained = {id(p) for optim in optims for group in optim.param_groups for p in group["params"]}
        cuts = model.stream.blocks if isinstance(model, SpotlighterWrapper) else ()
        if any(block < self.states.block for block in cuts):
            raise ValueError(f"{type(self).__name__} selects tokens before block {self.states.block}: set SELECT_BLOCK")
        skipped = [vision.conv1, vision.ln_pre, *vision.transformer.resblocks[: self.states.block]]
        prompted = any(module._forward_pre_hooks for module in skipped)  # MaPLe's prompts, and those of its kind
        if prompted or any(id(p) in trained for module in skipped for p in module.parameters()):
            raise ValueError(f"{type(self).__name__} trains blocks before {self.states.block}: its states change")
        keep_tail(vision, self.states.block)


class CachedRuns:
    """Calls of train.py in this process; runs in a row on one data set and backbone share their hidden states.

    Suits trainers that train nothing before block s, and images that are not augmented; another run fails in one line.
    """

    def __init__(self):
        self.key = self.states = None

    def call(self, run, errors, lock=()) -> int:
        """Make a `plan.Run`; returns train.py's exit code, what it says on standard error goes to the file `errors`."""
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(errors):
            try:
                training.run(run.arguments, self.build)
            except Exception as error:
                print(training.one_line(error) or traceback.format_exc(), file=errors)
                return 1
        return 0

    def build(self, cfg) -> TrainerBase:
        """The trainer of a configuration, on cached states."""
        config = from_cfg(cfg)
        merges = config.share or config.merge
        block = 1 if merges else (*(block for block, _ in config.stages), config.select_block)[0]
        key = cfg.DATASET.NAME, cfg.DATASET.ROOT, cfg.MODEL.BACKBONE.NAME, tuple(cfg.INPUT.SIZE), block
        if key != self.key:
            self.key = self.states = None  # frees the old ones first
            with torch.random.fork_rng():
                self.states = HiddenStates(cfg, block)
            self.key = key
        kind = TRAINER_REGISTRY.get(cfg.TRAINER.NAME)
        states = self.states if issubclass(kind, SpotlighterTrainerMixin) else self.states.readouts
        return type(kind.__name__, (CachedTower, kind), {"states": states})(cfg)


def keep_tail(vision: nn.Module, block: int) -> None:
    """Let a vision tower start at ``block``: its input is now hidden states (B, 1+N, w)."""
    for i in range(block):
        vision.transformer.resblocks[i] = nn.Identity()

    def forward(hidden: Tensor) -> Tensor:
        output = vision.transformer(hidden.permute(1, 0, 2))  # (1+N, B, w)
        return vision.ln_post(output[0]) @ vision.proj

    vision.forward = forward
