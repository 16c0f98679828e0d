"""`spotlighter evidence`: the table of hosts, controls and Spotlighter, with intervals."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...compat import ROOT
from ...files import write_aside
from ..sweeps.plan import ICONS
from ..sweeps.sweep import ListOptions
from ..training.settings import import_trainers_and_datasets
from .hosts import kind_of
from .results import Results
from .rows import rows as every_row
from .run import Laboratory
from .table import records
from .table import show as print_tables
from .tasks import configuration

FOLDER = Path("output/evidence")  # what saves time in another run

app = typer.Typer(add_completion=False)


@app.command(cls=ListOptions)
def command(
    host: Annotated[str, typer.Option(help="coop, kgcoop, maple, clipfit, promptkd")] = "coop",
    datasets: Annotated[list[str], typer.Option(help="names of configs/datasets, the source first")] = tuple(ICONS),
    seeds: Annotated[list[int], typer.Option(help="seeds of shots and training")] = (1, 2, 3),
    rows: Annotated[list[str], typer.Option(help="rows by name (default: all)")] = (),
    show: Annotated[bool, typer.Option("--show", help="run nothing: print what is kept")] = False,
    again: Annotated[bool, typer.Option("--again", help="run rows although their results are kept")] = False,
    every: Annotated[int, typer.Option(min=1, help="judge each N-th test picture")] = 1,
    shots: Annotated[int, typer.Option(min=1, help="training pictures a class")] = 16,
    cross: Annotated[bool, typer.Option(help="judge what learned on the first data set on the others, too")] = True,
    own: Annotated[bool, typer.Option(help="train on each data set (--no-own: on the first alone)")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the records there")] = None,
    results: Annotated[Path | None, typer.Option(help="finished rows (default: results/evidence_HOST.npz)")] = None,
    root: Annotated[str, typer.Option(help="folder of the data sets")] = "data",
) -> None:
    """Print the table of evidence: a host, its controls and Spotlighter, base and new, apart and in one label space,
    and the last of the rows minus each of the others.

    Finished rows are kept in one file, so a killed command goes on where it was.
    """
    kind, files = kind_of(host), [_file(dataset) for dataset in datasets]
    import_trainers_and_datasets()
    name, known = kind.trainer, every_row(kind)
    if unknown := set(rows).difference(row.name for row in known):
        raise ValueError(f"--rows {min(unknown)}: no such row; there are {', '.join(row.name for row in known)}")
    known = [row for row in known if not rows or row.name in rows]
    path = results or Path("results") / f"evidence_{host}.npz"
    if show and not path.exists():
        raise FileNotFoundError(f"{path}: no finished rows are kept there; run without --show")
    console, kept = Console(), Results(path)
    if not show:
        laboratory = Laboratory(kind, kept, root, FOLDER, again, every, shots)
        laboratory.run(known, files, list(seeds), files[0] if cross and len(files) > 1 else None, own)

    listed, sets = [row.name for row in known], [configuration(file, 1, root).DATASET.NAME for file in files]
    there = [d for d in sets if any(key.dataset == key.source == d for key in kept.facts)]
    seeds = [seed for seed in seeds if any((key.seed, key.shots) == (seed, shots) for key in kept.facts)]
    found = records(kept, listed, there, seeds, shots=shots)
    print_tables(found, console, f"{name}, {shots} shots, each data set for itself")
    moved = [d for d in sets if any(key.dataset == d != key.source == sets[0] for key in kept.facts)]
    if moved:
        others = records(kept, listed, moved, seeds, source=sets[0], shots=shots)
        print_tables(others, console, f"{name}, {shots} shots, trained on {sets[0]}")
        found += others
    complete = {record.get("method") for record in found}
    if missing := [row for row in listed if row not in complete]:
        console.print(f"Not there yet on every data set with every seed: {', '.join(missing)}")
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_aside(json_file, lambda file: file.write(f"{json.dumps(found, indent=1)}\n".encode()), "--json")
    console.print(f"Finished rows are in {path}; spotlighter evidence --host {host} --show prints them again")


def _file(name: str) -> str:
    """The configuration of a data set, by name or by path."""
    if name.endswith(".yaml"):
        return name
    known = sorted(path.stem for path in (ROOT / "configs/datasets").glob("*.yaml"))
    if name not in known:
        raise ValueError(f"--datasets {name}: take a file, or one of {', '.join(known)}")
    return f"configs/datasets/{name}.yaml"
