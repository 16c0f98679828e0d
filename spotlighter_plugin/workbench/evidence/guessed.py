"""How much evidence may say that is filed under guesses, by validation scenes of base classes: `memory.GUESSED`.

    python -m spotlighter_plugin.workbench.evidence.guessed --root data

PromptKD distils on the miniature of a task, where half of the base classes play new; the pictures of all of them are
filed under its teacher's guesses. Printed for each weight: harmonic means of own halves and in one label space.
"""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ...config import SpotlighterConfig
from ...method import memory
from ..training.settings import import_trainers_and_datasets
from .cell import Cell
from .command import FOLDER
from .hosts import kind_of
from .plugin import attach
from .tasks import FrozenTower, configuration, load_task

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


def sweep(cell: Cell, weights=WEIGHTS) -> dict[float, tuple[float, float]]:
    """By weight: HM of own halves and in one label space."""
    small = cell.host[1]
    learned, kept, found = cell.learned(small, cell.mini), memory.GUESSED, {}
    try:
        for weight in weights:
            memory.GUESSED = weight
            found[weight] = cell.means(attach(small, SpotlighterConfig(), cell.mini, learned, cell.tower))
    finally:
        memory.GUESSED = kept
    return found


def main(
    root: Annotated[str, typer.Option(help="folder of the data sets")] = "data",
    dataset: Annotated[str, typer.Option(help="a file of configs/datasets")] = "configs/datasets/icon_scenes.yaml",
    seed: Annotated[int, typer.Option(help="of shots and training")] = 1,
) -> None:
    import_trainers_and_datasets()
    kind = kind_of("promptkd")
    tower = FrozenTower(configuration(dataset, seed, root, options=kind.backbone), FOLDER)
    cell = Cell(kind, dataset, seed, root, load_task(configuration(dataset, seed, root)), tower, FOLDER)
    table = Table("weight", "HM", "HM in one label space", title=f"PromptKD, {tower.dataset}, validation, seed {seed}")
    for weight, figures in sweep(cell).items():
        table.add_row(f"{weight:g}", *(f"{figure:.1f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
