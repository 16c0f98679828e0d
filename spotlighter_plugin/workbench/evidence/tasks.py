"""What is learned and what is judged: pictures and classes, whole and in miniature, and what the frozen tower sees."""

import contextlib
import hashlib
import io
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from dassl.data.datasets import build_dataset
from dassl.data.transforms import build_transform
from dassl.utils import read_image
from torch import Tensor
from yacs.config import CfgNode

from ...files import write_aside
from ...towers.clip import load_clip
from ..training.settings import import_trainers_and_datasets, parse, setup_cfg

BATCH = 128  # pictures in one pass of the frozen tower


@dataclass(frozen=True)
class Scenes:
    """Pictures and their classes (n,)."""

    paths: list[str]
    labels: Tensor

    def of_classes(self, low: int, high: int) -> "Scenes":
        """Those of the classes low … high-1; labels stay."""
        inside = ((self.labels >= low) & (self.labels < high)).tolist()
        return Scenes([p for p, keep in zip(self.paths, inside, strict=True) if keep], self.labels[inside])


@dataclass(frozen=True)
class Task:
    """C classes; the first ``known`` (base) have shots, the others are new.

    Attributes:
        shots: of the known classes. held_out: validation pictures of the known classes.
        others: shots of the new classes, at which nothing but the upper line looks.
        test: pictures of all classes.
    """

    names: list[str]
    known: int
    shots: Scenes
    held_out: Scenes
    others: Scenes
    test: Scenes

    @property
    def pooled(self) -> "Task":
        """Shots of all classes, as if all were known; for who does without labels."""
        shots = Scenes(self.shots.paths + self.others.paths, torch.cat([self.shots.labels, self.others.labels]))
        return Task(self.names, len(self.names), shots, self.held_out, self.others.of_classes(0, 0), self.test)

    def miniature(self) -> "Task":
        """The same made of the known classes alone, to choose settings by: their second half is new, test is what is
        held out. Shots are split with their classes."""
        half = math.ceil(self.known / 2)
        return Task(
            self.names[: self.known], half, self.shots.of_classes(0, half), self.held_out.of_classes(0, half),
            self.shots.of_classes(half, self.known), self.held_out,
        )  # fmt: skip


def configuration(
    dataset: str, seed: int, root: str, trainer: str = "CoOp", options: dict | None = None, folder: str = ""
) -> CfgNode:
    """Dassl's configuration for a data set's file, a trainer and options as on train.py's command line."""
    opts = {"DATASET.SUBSAMPLE_CLASSES": "all", "TEST.NO_TEST": True, **(options or {})}
    flags = ["--trainer", trainer, "--dataset-config-file", dataset, "--root", root, "--seed", str(seed)]
    flags += ["--output-dir", str(folder)] if folder else []
    return setup_cfg(parse([*flags, *(str(x) for pair in opts.items() for x in pair)]), import_trainers_and_datasets())


def load_task(cfg, every: int = 1) -> Task:
    """The base-to-new task of a configuration's data set: the first half of the classes (the larger one) is known.

    every: of the test pictures each ``every``-th is judged.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        data = build_dataset(cfg)
    parts = {
        part: Scenes([item.impath for item in items], torch.tensor([item.label for item in items], dtype=torch.long))
        for part, items in (("train", data.train_x), ("val", data.val or []), ("test", data.test[::every]))
    }
    classes, known = data.num_classes, math.ceil(data.num_classes / 2)
    if not parts["val"].paths:
        raise ValueError(f"{cfg.DATASET.NAME} has no validation split: nothing can be chosen honestly")
    return Task(
        list(data.classnames), known, parts["train"].of_classes(0, known), parts["val"].of_classes(0, known),
        parts["train"].of_classes(known, classes), parts["test"],
    )  # fmt: skip


class FrozenTower:
    """What a frozen vision tower sees in pictures: CLS features, kept on disk, and hidden states, kept for a while.

    Args:
        cfg: names backbone and transforms, which may not be random.
        folder: where features are kept, by tower and data set; a picture is known by its bytes.
    """

    def __init__(self, cfg, folder: Path):
        if set(cfg.INPUT.TRANSFORMS) - {"normalize", "center_crop"}:
            raise ValueError(
                f"INPUT.TRANSFORMS {list(cfg.INPUT.TRANSFORMS)}: evidence is judged on pictures as they are; "
                "set INPUT.TRANSFORMS \"('normalize',)\""
            )
        with contextlib.redirect_stdout(io.StringIO()):
            self.transform = build_transform(cfg, is_train=False)
        self.device = torch.device("cuda" if torch.cuda.is_available() and cfg.USE_CUDA else "cpu")
        self.dataset = cfg.DATASET.NAME
        self.clip = load_clip(cfg.MODEL.BACKBONE.NAME, self.device)
        self.vision = self.clip.visual
        digest = hashlib.blake2b(digest_size=8)
        for tensor in self.clip.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        self.fingerprint = digest.hexdigest()
        self._folder, self._known, self._row, self._states = Path(folder), {}, {}, {}

    def pictures(self, paths: list[str]) -> Tensor:
        """(n, 3, h, w), normalized, on the device."""
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(lambda path: self.transform(read_image(path)), paths))).to(self.device)

    @torch.no_grad()
    def features(self, paths: list[str], way: str = "", see: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """CLS in the joint space, (n, d) float32 of unit length; each picture is read and computed once.

        way, see: a name for another way to look at pictures, and that way.
        """
        known, row = self._read(way), self._row.setdefault(way, {})
        new = [path for path in dict.fromkeys(paths) if path not in row]
        prints = {path: hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest() for path in new}
        unseen = list({prints[path]: path for path in new if prints[path] not in known}.values())
        for i, part in enumerate(chunks(unseen), 1):
            seen = (see or self.vision)(self.pictures(part)).float()
            known |= {prints[p]: f for p, f in zip(part, F.normalize(seen, dim=-1).cpu().numpy(), strict=True)}
            if i % 8 == 0 or i * BATCH >= len(unseen):
                self._write(way)
        row |= {path: known[prints[path]] for path in new}
        return torch.from_numpy(np.stack([row[path] for path in paths])).to(self.device)

    @torch.no_grad()
    def states(self, paths: list[str], block: int) -> Tensor:
        """Hidden states (n, 1+N, w) in half precision, on entering ``block``; kept until ``forget``."""
        kept = self._states.setdefault(block, {})
        for part in chunks([path for path in dict.fromkeys(paths) if path not in kept]):
            kept |= zip(part, self._enter(self.pictures(part), block).half().cpu(), strict=True)
        return torch.stack([kept[path] for path in paths])

    def forget(self) -> None:
        self._states = {}

    def _enter(self, images: Tensor, block: int) -> Tensor:
        vision, caught = self.vision, {}

        class Entered(Exception):
            pass

        def stop(module, args):
            caught["hidden"] = args[0].transpose(0, 1)  # (b, 1+N, w)
            raise Entered

        hook = vision.transformer.resblocks[block].register_forward_pre_hook(stop)
        try:
            vision(images)
        except Entered:
            return caught["hidden"]
        finally:
            hook.remove()

    def _file(self, way: str) -> Path:
        return self._folder / f"{self.fingerprint}-{self.dataset}{way and '-' + way}.npz"

    def _read(self, way: str) -> dict[bytes, np.ndarray]:
        if way not in self._known:
            self._known[way] = {}
            if self._file(way).exists():
                with np.load(self._file(way)) as data:
                    pairs = zip(data["prints"], data["features"], strict=True)
                    self._known[way] = {row.tobytes(): f for row, f in pairs}
        return self._known[way]

    def _write(self, way: str) -> None:
        known = self._known[way]
        prints = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(len(known), -1)
        self._folder.mkdir(parents=True, exist_ok=True)
        features = np.stack(list(known.values()))
        write_aside(self._file(way), lambda file: np.savez(file, prints=prints, features=features), "folder")


def chunks(paths: list[str]) -> Iterator[list[str]]:
    """Parts of ``BATCH``."""
    return (paths[i : i + BATCH] for i in range(0, len(paths), BATCH))
