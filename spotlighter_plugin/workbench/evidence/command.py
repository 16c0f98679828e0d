"""`spotlighter evidence`: the table of hosts, controls and Spotlighter, with intervals."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

FAMILY = tuple(f"configs/datasets/emoji_scenes{part}.yaml" for part in ("", "_pixel", "_dark", "_swap"))
FOLDER = Path("output/evidence")


def command(
    host: Annotated[str, typer.Option(help="coop")] = "coop",
    datasets: Annotated[list[str], typer.Option(help="data sets' files; the first is the source")] = list(FAMILY),
    seeds: Annotated[list[int], typer.Option(help="seeds of shots and training")] = [1, 2, 3],  # noqa: B006
    rows: Annotated[list[str] | None, typer.Option(help="rows by name (default: all)")] = None,
    results: Annotated[Path | None, typer.Option(help="file of finished rows (default: results/evidence_HOST.npz)")] = None,
    show: Annotated[bool, typer.Option("--show", help="run nothing: print what is kept")] = False,
    again: Annotated[bool, typer.Option("--again", help="run rows although their results are kept")] = False,
    cross: Annotated[bool, typer.Option(help="judge what was trained on the first data set on the others, too")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the records there")] = None,
    root: Annotated[str, typer.Option(help="folder of the data sets")] = "data",
):
    """Print the table of evidence: every row with its controls, base, new and both in one label space.

    Finished rows are kept in one file, so a killed command goes on where it was.
    """
    from ..training.settings import import_trainers_and_datasets
    from .results import Results
    from .rows import rows as every_row
    from .run import Laboratory
    from .table import records, show as print_tables
    from .tasks import configuration, written_aside

    import_trainers_and_datasets()
    hosts = {"coop": "CoOp"}
    if host not in hosts:
        raise ValueError(f"--host {host}: take one of {', '.join(hosts)}")
    known = every_row(hosts[host])
    names = [row.name for row in known]
    if unknown := set(rows or ()).difference(names):
        raise ValueError(f"--rows {min(unknown)}: no such row; there are {', '.join(names)}")
    chosen = [row for row in known if not rows or row.name in rows]
    path = results or Path("results") / f"evidence_{host}.npz"
    if show and not path.exists():
        raise FileNotFoundError(f"{path}: no finished rows are kept there; run without --show")
    console, kept = Console(), Results(path)
    if not show:
        laboratory = Laboratory(kept, root, FOLDER, again, console.print)
        laboratory.run(chosen, list(datasets), list(seeds), datasets[0] if cross and len(datasets) > 1 else None)

    order, found = [configuration(d, 1, root).DATASET.NAME for d in datasets], []
    there = [d for d in order if any(key.dataset == d == key.source for key in kept.facts)]
    ours, listed = f"{hosts[host]} + Spotlighter", [row.name for row in chosen]
    own = records(kept, listed, there, list(seeds), ours)
    print_tables(own, there, list(seeds), console, f"{hosts[host]}, trained on each")
    others = [d for d in there[1:] if any(key.dataset == d and key.source == there[0] for key in kept.facts)]
    if others:
        moved = records(kept, listed, others, list(seeds), ours, source=there[0])
        print_tables(moved, others, list(seeds), console, f"{hosts[host]}, trained on {there[0]}")
        found = moved
    complete = {record.get("method") for record in own}
    if missing := [name for name in listed if name not in complete]:
        console.print(f"Not there yet on all of these data sets and seeds: {', '.join(missing)}")
    if json_file:
        with written_aside(json_file) as aside:
            aside.write_text(json.dumps(own + found, indent=1) + "\n")
    console.print(f"Finished rows are in {path}; spotlighter evidence --host {host} --show prints them again")
