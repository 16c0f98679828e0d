"""Harmonic mean against images/s, on validation scenes of EmojiScenes' base classes alone.

    python tools/speed_accuracy.py --out OUT             each s, with k of 8, 16, 32, 64 and all; zero-shot
    python tools/speed_accuracy.py --out OUT --presets   `fast` against `default`

With --presets CoOpSpotlighter is trained. Every finished cell is kept in the output folder, so a killed command goes on
where it was.
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

from evidence import HOST  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from selection import ZERO_SHOT, accuracy  # noqa: E402

from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper  # noqa: E402
from spotlighter_plugin.bench import Bench, swept  # noqa: E402
from spotlighter_plugin.bench_hosts import shape_of  # noqa: E402
from spotlighter_plugin.config import PRESETS  # noqa: E402
from spotlighter_plugin.experiment import (  # noqa: E402
    FAMILY,
    Laboratory,
    Method,
    Outcome,
    harmonic_mean,
    paired_interval,
)

HALVES = ("inner-base", "inner-new")
SHAPE = shape_of("tiny")
KEPT = (8, 16, 32, 64, SHAPE.tokens)
OPTION = "TRAINER.SPOTLIGHTER."


def preset(name: str, **options) -> Method:
    options = {OPTION + key: value for key, value in {"PRESET": name.split(",")[0], **options}.items()}
    return Method(name, "CoOpSpotlighter", {**HOST, **options})


FAST = PRESETS["fast"]
ROWS = [
    preset("default"),
    preset("fast"),
    preset("fast, dropped tokens thrown away", FUSE_DROPPED=False, TOP_K=FAST["top_k"] + 1),  # as many positions
]


def grid(dataset: str, root: str, cells: dict, keep) -> None:
    """Fill cells["<s> <k>"] with the zero-shot harmonic mean; all tokens are the host, whatever the block."""
    for block in range(SHAPE.layers):
        todo = [k for k in KEPT if f"{block} {k}" not in cells and (k < SHAPE.tokens or block == SHAPE.layers - 1)]
        if not todo:
            continue
        laboratory = Laboratory(dataset, root, block, HALVES)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            halves = [laboratory.trainer(ZERO_SHOT, 1, part, folder) for part in HALVES]
        for k in track(todo, f"{Path(dataset).stem}, block {block}"):
            config = SpotlighterConfig(top_k=k, select_block=block, mapping="none", prototype_logits=False, losses=())
            scores = []
            for half in halves:
                wrapper = SpotlighterWrapper(half.clip_model, config, class_names=half.dm.dataset.classnames)
                scores.append(accuracy(wrapper.eval(), half.test_loader))
                wrapper.detach()
            cells[f"{block} {k}"] = harmonic_mean(*scores)
            keep()


def speeds(batch_size: int = 32) -> dict[str, float]:
    """Images/s of each cell, timed in turn, and of the host with its texts kept."""
    sweep = f"select_block={','.join(map(str, range(SHAPE.layers)))},top_k={','.join(map(str, KEPT[:-1]))}"
    options = {"backbone": "tiny", "batch_size": batch_size, "classes": 82, "runs": 5}
    records = Bench(swept(options, sweep)).inference(upstream=False)
    rates = {f"{r['select_block']} {r['top_k']}": r["images_per_second_spotlighter"] for r in records}
    return {**rates, f"{SHAPE.layers - 1} {SHAPE.tokens}": records[0]["images_per_second_host_cached_text"]}


def show_grid(found: dict) -> None:
    host = f"{SHAPE.layers - 1} {SHAPE.tokens}"
    mean = {cell: np.mean([cells[cell] for cells in found["HM"].values()]) for cell in found["images/s"]}
    table = Table("s", *(f"k = {k}" for k in KEPT[:-1]), title=f"HM, images/s: zero-shot, {', '.join(found['HM'])}")
    for block in range(SHAPE.layers):
        cells = [f"{block} {k}" for k in KEPT[:-1]]
        table.add_row(str(block), *(f"{mean[cell]:.1f}, {found['images/s'][cell]:.0f}" for cell in cells))
    table.caption = f"all tokens (the host): {mean[host]:.1f}, {found['images/s'][host]:.0f}"
    Console().print(table)


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
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="with --presets")
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
        outcomes = {method.name: [] for method in ROWS}
        for dataset in args.datasets:
            cells = found["trained"].setdefault(Path(dataset).stem, {})
            laboratory = Laboratory(dataset, args.root, FAST["select_block"], HALVES)
            for method in ROWS:
                outcomes[method.name] += train(method, laboratory, args.seeds, cells, keep)
        show_presets(outcomes, args.datasets, args.seeds)
        return
    for dataset in args.datasets:
        grid(dataset, args.root, found["HM"].setdefault(Path(dataset).stem, {}), keep)
    if "images/s" not in found:
        found["images/s"] = speeds()
        keep()
    show_grid(found)


if __name__ == "__main__":
    main()
