"""`spotlighter demo`: CoOp with and without Spotlighter, base-to-new on EmojiScenes, with speed beside accuracy."""

import contextlib
import io
import statistics
import tempfile
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from .speed.stopwatch import alternate
from .training.experiment import Laboratory, Method

DATASET = "configs/datasets/emoji_scenes.yaml"
BUDGET = {
    "OPTIM.LR": 0.3,
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


def run(root: str = "data", seed: int = 1) -> None:
    """Train and test every method on one seed, time them alternately, and print one table."""
    console = Console()
    console.print(f"EmojiScenes, tiny CLIP, 16 shots, seed {seed}, every third test scene (drawn on the first run)")
    laboratory = Laboratory(DATASET, root, thin=THIN)
    outcomes = {}
    for method in METHODS:
        console.print(f"  {method.name} …", end=" ")
        outcomes[method.name] = outcome = laboratory.run(method, seed)
        console.print(f"{outcome.seconds:.0f} s")
    speeds = images_per_second(METHODS, root, seed)
    table = Table("method", title="EmojiScenes, base-to-new")
    for column in ("base", "new", "HM", "images/s", "trainable parameters"):
        table.add_column(column, justify="right")
    for method in METHODS:
        outcome = outcomes[method.name]
        accuracies = (outcome.accuracy("base"), outcome.accuracy("new"), outcome.harmonic_mean)
        table.add_row(
            method.name, *(f"{a:.1f}" for a in accuracies), f"{speeds[method.name]:.0f}", f"{outcome.parameters:,}"
        )
    console.print(table)


@torch.no_grad()
def images_per_second(methods, root: str, seed: int) -> dict[str, float]:
    """Speed of each method on whole images, text embeddings computed once; methods take turns, medians are given."""
    laboratory = Laboratory(DATASET, root, block=None)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainers = {method.name: laboratory.trainer(method, seed, "base", folder) for method in methods}
    first = next(iter(trainers.values()))
    batch = torch.randn(BATCH, 3, *first.cfg.INPUT.SIZE, device=first.device)  # speed does not depend on the pictures
    for trainer in trainers.values():
        trainer.set_model_mode("eval")
    legs = {name: partial(trainer.model_inference, batch) for name, trainer in trainers.items()}
    times = alternate(legs, PAIRS, first.device)
    return {name: BATCH / statistics.median(values) for name, values in times.items()}
