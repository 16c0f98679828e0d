"""Harmonic mean against images/s, on validation scenes of EmojiScenes' base classes alone.

    python tools/speed_accuracy.py --out OUT             each s and k, and variants of equal cost
    python tools/speed_accuracy.py --out OUT --presets   `default` and `fast` against s = L-1

Zero-shot; with --presets CoOpSpotlighter is trained. Every finished cell is kept in the output folder, so a killed
command goes on where it was.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evidence import PLUGIN  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from selection import accuracy  # noqa: E402

from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper  # noqa: E402
from spotlighter_plugin.config import PRESETS  # noqa: E402
from spotlighter_plugin.workbench.speed.bench import Bench, swept  # noqa: E402
from spotlighter_plugin.workbench.speed.bench_hosts import shape_of  # noqa: E402
from spotlighter_plugin.workbench.training.experiment import (  # noqa: E402
    FAMILY,
    Laboratory,
    Method,
    Outcome,
    harmonic_mean,
    paired_interval,
)

ZERO_SHOT = Method("zero-shot CLIP", "ZeroshotCLIP", {"DATASET.NUM_SHOTS": 1})  # shots are not looked at
HALVES = ("inner-base", "inner-new")
SHAPE = shape_of("tiny")
KEPT = (8, 16, 32, 64, SHAPE.tokens)


# All cost the same on a ViT-B/16, 12 / (4 + 8 · 42/197) = × 2.10: the same sum of positions over the blocks.
VARIANTS = {
    "before 4: 41": {"select_block": 4, "top_k": 41, "fuse_dropped": False},
    "before 4: 40 + 1": {"select_block": 4, "top_k": 40, "fuse_dropped": True},
    "before 4: 44 + 1, before the last: 15 + 1": {
        "stages": ((4, 44),), "select_block": -1, "top_k": 15, "fuse_dropped": True,
    },
    "before 3: 80, before 4: 55": {
        "stages": ((3, 80),), "select_block": 4, "top_k": 55, "fuse_dropped": False,
    },
    "before 3: 79 + 1, before 4: 54 + 1": {"stages": ((3, 79),), "select_block": 4, "top_k": 54, "fuse_dropped": True},
}  # fmt: skip


def fill(cells: dict, wanted: dict[str, dict], dataset: str, root: str, block: int, thin: int, keep) -> None:
    """cells[name] = zero-shot harmonic mean with the options wanted[name], on states that enter ``block``."""
    todo = wanted.keys() - cells.keys()
    if not todo:
        return
    laboratory = Laboratory(dataset, root, block, HALVES, thin)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        halves = [laboratory.trainer(ZERO_SHOT, 1, part, folder) for part in HALVES]
    for name in track(sorted(todo), f"{Path(dataset).stem}, from block {block} on"):
        config = SpotlighterConfig(mapping="none", prototype_logits=False, losses=(), **wanted[name])
        scores = []
        for half in halves:
            wrapper = SpotlighterWrapper(half.clip_model, config, class_names=half.dm.dataset.classnames)
            scores.append(accuracy(wrapper.eval(), half.test_loader))
            wrapper.detach()
        cells[name] = harmonic_mean(*scores)
        keep()


def grid(dataset: str, root: str, cells: dict, thin: int, keep) -> None:
    """Every s and k as "<s> <k>", all tokens once: they are the host, whatever the block; and the variants."""
    fill(cells, VARIANTS, dataset, root, 3, 1, keep)
    for block in reversed(range(SHAPE.layers)):
        kept = KEPT if block == SHAPE.layers - 1 else KEPT[:-1]
        fill(
            cells, {f"{block} {k}": {"select_block": block, "top_k": k} for k in kept}, dataset, root, block, thin, keep
        )


def speeds(batch_size: int = 32) -> dict[str, float]:
    """Images/s of each cell, timed in turn, and of the host with its texts kept."""
    sweep = f"select_block={','.join(map(str, range(SHAPE.layers)))},top_k={','.join(map(str, KEPT[:-1]))}"
    options = {"backbone": "tiny", "batch_size": batch_size, "classes": 82, "runs": 5}
    records = Bench(swept(options, sweep)).inference(upstream=False)
    rates = {f"{r['select_block']} {r['top_k']}": r["images_per_second_spotlighter"] for r in records}
    return {**rates, f"{SHAPE.layers - 1} {SHAPE.tokens}": records[0]["images_per_second_host_cached_text"]}


def show_grid(found: dict) -> None:
    host = f"{SHAPE.layers - 1} {SHAPE.tokens}"
    every = [*found["images/s"], *VARIANTS]
    mean = {cell: np.mean([cells[cell] for cells in found["HM"].values()]) for cell in every}
    table = Table("s", *(f"k = {k}" for k in KEPT[:-1]), title=f"HM, images/s: zero-shot, {', '.join(found['HM'])}")
    for block in range(SHAPE.layers):
        cells = [f"{block} {k}" for k in KEPT[:-1]]
        table.add_row(str(block), *(f"{mean[cell]:.1f}, {found['images/s'][cell]:.0f}" for cell in cells))
    table.caption = (
        f"behind the k tokens one for the rest; all tokens (the host): {mean[host]:.1f}, {found['images/s'][host]:.0f}"
    )
    Console().print(table)
    for name in VARIANTS:
        print(f"{name}: {mean[name]:.1f}")


def train(method: Method, laboratory: Laboratory, seeds, cells: dict, keep) -> list[Outcome]:
    """An outcome per seed; what cells["<method> <seed>"] does not hold yet, scene by scene, is trained."""
    for seed in track(seeds, f"{Path(laboratory.dataset).stem}, {method.name}"):
        if f"{method.name} {seed}" not in cells:
            correct = laboratory.run(method, seed).correct
            cells[f"{method.name} {seed}"] = {part: right.astype(int).tolist() for part, right in correct.items()}
            keep()
    every = [cells[f"{method.name} {seed}"] for seed in seeds]
    return [Outcome({part: np.array(right, bool) for part, right in cell.items()}, 0, 0) for cell in every]


def show_presets(outcomes: dict[str, list[Outcome]], datasets, seeds) -> None:
    """A row per method: mean over data sets and seeds, and its paired difference to the first row."""
    names = ", ".join(Path(dataset).stem for dataset in datasets)
    table = Table("", "base", "new", "HM", "minus the first", title=f"trained, seeds {seeds}: {names}")
    first = next(iter(outcomes.values()))
    for name, found in outcomes.items():
        means = [np.mean([outcome.accuracy(part) for outcome in found]) for part in ("base", "new")]
        difference = "{:+.2f} ({:+.2f} to {:+.2f})".format(*paired_interval(found, first)) if found is not first else ""
        hm = np.mean([outcome.harmonic_mean for outcome in found])
        table.add_row(name, *(f"{value:.1f}" for value in (*means, hm)), difference)
    table.caption = "in brackets: 95 % interval of a bootstrap over scenes"
    Console().print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is finished")
    parser.add_argument("--root", default="data", help="folder of the data sets")
    parser.add_argument("--datasets", nargs="+", default=FAMILY[:1], help="configuration files")
    parser.add_argument("--thin", type=int, default=1, help="every n-th scene (odd: vendors alternate), for s and k")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="with --presets")
    parser.add_argument("--shots", type=int, default=16, help="with --presets")
    parser.add_argument("--presets", action="store_true", help="train the presets instead")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "finished.json"
    found = json.loads(path.read_text()) if path.exists() else {"HM": {}, "trained": {}}

    def keep():
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(aside, path)

    if args.presets:
        common = {**PLUGIN, "DATASET.NUM_SHOTS": args.shots}
        last = {"SELECT_BLOCK": -1, "TOP_K": 32, "FUSE_DROPPED": False}
        rows = [
            Method(
                f"{name}, {args.shots} shots",
                "CoOpSpotlighter",
                {**common, **{f"TRAINER.SPOTLIGHTER.{key}": value for key, value in options.items()}},
            )
            for name, options in {
                "s = L-1, k = 32": {"PRESET": "default", **last},
                "default": {"PRESET": "default"},
                "fast": {"PRESET": "fast"},
            }.items()
        ]
        outcomes = {method.name: [] for method in rows}
        for dataset in args.datasets:
            cells = found["trained"].setdefault(Path(dataset).stem, {})
            laboratory = Laboratory(dataset, args.root, PRESETS["fast"]["select_block"], HALVES)
            for method in rows:
                outcomes[method.name] += train(method, laboratory, args.seeds, cells, keep)
        show_presets(outcomes, args.datasets, args.seeds)
        return
    for dataset in args.datasets:
        grid(dataset, args.root, found["HM"].setdefault(Path(dataset).stem, {}), args.thin, keep)
    if "images/s" not in found:
        found["images/s"] = speeds()
        keep()
    show_grid(found)


if __name__ == "__main__":
    main()
