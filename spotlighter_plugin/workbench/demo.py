"""`spotlighter demo`: CoOp with and without Spotlighter, base-to-new on IconScenes, with speed beside accuracy."""

import contextlib
import io
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..files import write_aside
from .progress import Steps
from .speed.stopwatch import alternate
from .training.experiment import Laboratory, Method

DATASET = "configs/datasets/icon_scenes.yaml"
BUDGET = {
    "OPTIM.LR": 0.03,
    "OPTIM.MAX_EPOCH": 5,
    "DATALOADER.TRAIN_X.BATCH_SIZE": 256,
}
METHODS = (
    Method("zero-shot CLIP", "ZeroshotCLIP", sees_tokens=False),
    Method("CoOp", "CoOp", BUDGET, sees_tokens=False),
    Method("CoOp + Spotlighter", "CoOpSpotlighter", {**BUDGET, "TRAINER.SPOTLIGHTER.LOSSES": "()"}),
)
BATCH, PAIRS = 64, 8
THIN = 3  # every third test scene
QUICK = {"DATASET.NUM_SHOTS": 2, "OPTIM.MAX_EPOCH": 1}
NEXT = (
    "spotlighter visualize tsne --classes 5 --images 10   # embeddings with and without Spotlighter, as a picture",
    "spotlighter attach PATH/TO/FORK --dry-run            # what it would add to your fork of CoOp, MaPLe, …",
)


def run(root: str = "data", seed: int = 1, output: Path = Path("output/demo"), quick: bool = False) -> None:
    """Train and test every method on one seed, time them alternately, print one table and keep it with the logs.

    quick: two shots, one epoch, a quarter of the classes against another and their validation scenes: to see that
        everything runs; the figures mean little.
    """
    console, rows = Console(), []
    parts = ("inner-base", "inner-new") if quick else ("base", "new")
    scenes = "2 shots, 1 epoch, a quarter of the classes" if quick else "16 shots, every third test scene"
    console.print(f"IconScenes, tiny CLIP, seed {seed}, {scenes}; pictures are drawn on the first run")
    with Steps(len(METHODS) + 1) as steps:
        laboratory = Laboratory(DATASET, root, classes=parts, thin=8 if quick else THIN, say=steps.say)
        for method in METHODS:
            options = {**method.options, **QUICK} if quick else method.options
            chosen = Method(method.name, method.trainer, options, sees_tokens=method.sees_tokens)
            outcome = laboratory.run(chosen, seed, log=output / f"{method.name.replace(' ', '_')}.txt")
            row = {"method": method.name, "base": outcome.accuracy("base"), "new": outcome.accuracy("new")}
            rows.append({**row, "hm": outcome.harmonic_mean, "trained": outcome.parameters})
            steps.advance()
        steps.say("speed: the methods in turn")
        speeds = images_per_second(METHODS, root, seed, parts[0], *((8, 1) if quick else (BATCH, PAIRS)))
    table = Table("method", title="IconScenes, base-to-new")
    for column in ("base", "new", "HM", "images/s", "trainable parameters"):
        table.add_column(column, justify="right")
    for row in rows:
        row["images_per_second"] = speeds[row["method"]]
        accuracies = (f"{row[name]:.1f}" for name in ("base", "new", "hm"))
        table.add_row(row["method"], *accuracies, f"{row['images_per_second']:.0f}", f"{row['trained']:,}")
    console.print(table)
    console.print(
        "base, new: accuracy in % on classes with and without shots; HM: their harmonic mean.", highlight=False
    )
    write_aside(output / "table.json", lambda file: file.write(f"{json.dumps(rows, indent=1)}\n".encode()))
    console.print(f"results: {output / 'table.json'}, logs beside it. Next:", highlight=False)
    for command in NEXT:
        console.print(f"  {command}", highlight=False, soft_wrap=True)


@torch.no_grad()
def images_per_second(
    methods, root: str, seed: int, classes: str = "base", size: int = BATCH, pairs: int = PAIRS
) -> dict[str, float]:
    """Speed of each method on whole images, text embeddings computed once; methods take turns, medians are given."""
    laboratory = Laboratory(DATASET, root, block=None)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainers = {method.name: laboratory.trainer(method, seed, classes, folder) for method in methods}
    first = next(iter(trainers.values()))
    batch = torch.randn(size, 3, *first.cfg.INPUT.SIZE, device=first.device)  # speed does not depend on the pictures
    for trainer in trainers.values():
        trainer.set_model_mode("eval")
    legs = {name: partial(trainer.model_inference, batch) for name, trainer in trainers.items()}
    times = alternate(legs, pairs, first.device)
    return {name: size / statistics.median(values) for name, values in times.items()}
