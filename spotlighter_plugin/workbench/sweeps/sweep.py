"""`spotlighter sweep`: a whole protocol with one command."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer.core import TyperCommand

from ..training.runs import progress
from .launch import LAUNCHERS
from .plan import GROUPS, HERE, PROTOCOLS, Plan, train_py


def sweep(plan, jobs=1, launcher="here", console=None, gpus_per_run=1) -> list[str]:
    """Run what is missing of a plan and show progress. Returns the failures, one line each.

    Raises: ValueError with one line for a plan or a launcher that cannot be.
    """
    if launcher not in LAUNCHERS:
        raise ValueError(f"unknown launcher {launcher!r}: take {', '.join(LAUNCHERS)}")
    if jobs < 1:
        raise ValueError(f"--jobs is {jobs}, must be at least 1")
    if gpus_per_run < 0:
        raise ValueError(f"--gpus-per-run is {gpus_per_run}, must be at least 0")
    console = console or Console(file=sys.stdout)  # of now: a launcher may redirect it for its runs
    chains = plan.chains()
    runs = [run for chain in chains for run in chain]
    complete = {run.folder for run in runs if run.complete}
    failures = [f"{run.name}: {run.contradiction()}" for run in runs if run.folder in complete and run.contradiction()]
    chains = [chain for chain in chains if not complete.issuperset(run.folder for run in chain)]
    console.print(f"{plan.protocol}: {len(runs)} runs, {len(complete)} of them complete")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(plan.protocol, total=len(runs) - len(complete))
        left = {index: [run for run in chain if run.folder not in complete] for index, chain in enumerate(chains)}
        for event in LAUNCHERS[launcher](chains, plan.home, jobs, gpus_per_run) if chains else ():
            if event:
                index, failure = event
                left.pop(index)
                if failure:
                    failures.append(failure)
                    bar.console.print(f"failed: {failure}", markup=False, highlight=False)
            ended = len(runs) - len(complete) - sum(map(len, left.values()))
            bar.update(task, completed=ended + sum(progress(rest[0].folder) for rest in left.values()))
    console.print(f"{sum(run.complete for run in runs)} of {len(runs)} runs are complete, {len(failures)} failed")
    for failure in failures:
        console.print(f"  {failure}", markup=False, highlight=False)
    return failures


class ListOptions(TyperCommand):
    """Lets `--seeds 1 2 3` stand for `--seeds 1 --seeds 2 --seeds 3`."""

    def parse_args(self, ctx, args) -> list[str]:
        lists = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        repeated, flag = [], None
        for position, arg in enumerate(args):
            if arg == "--":
                repeated += args[position:]
                break
            if arg.startswith("--"):
                flag = arg if arg in lists else None
                repeated += [] if flag else [arg]
            else:
                repeated += [flag, arg] if flag else [arg]
        return super().parse_args(ctx, repeated)


app = typer.Typer(add_completion=False)


@app.command(cls=ListOptions)
def command(
    protocol: Annotated[str, typer.Argument(help=f"{', '.join(PROTOCOLS)}")],
    options: Annotated[list[str], typer.Argument(help="after --: KEY VALUE options for every run")] = (),
    hosts: Annotated[list[str], typer.Option(help="trainers, e.g. CoOp CoOpSpotlighter")] = ("CoOp", "CoOpSpotlighter"),
    datasets: Annotated[list[str], typer.Option(help=f"names of configs/datasets, or {', '.join(GROUPS)}")] = (),
    seeds: Annotated[list[int], typer.Option()] = (1, 2, 3),
    shots: Annotated[list[int], typer.Option(help="default: 16; fewshot: 1 2 4 8 16; PromptKD: 0, every image")] = (),
    source: Annotated[str, typer.Option(help="crossdomain, crossdataset: where to train (default: imagenet)")] = "",
    config: Annotated[str, typer.Option(help="name of configs/trainers/<host>/<name>.yaml")] = "default",
    root: Annotated[Path, typer.Option(help="folder of the data sets")] = Path("data"),
    output: Annotated[Path, typer.Option(help="folder of the runs")] = Path("output"),
    jobs: Annotated[int, typer.Option(help="runs at once")] = 1,
    launcher: Annotated[str, typer.Option(help=f"{', '.join(LAUNCHERS)}")] = "here",
    gpus_per_run: Annotated[int, typer.Option(help="of a run, as many processes if above 1; 0: none")] = 1,
    plan_only: Annotated[bool, typer.Option("--plan", help="print the runs and stop")] = False,
) -> None:
    """Run a whole protocol: skip what is complete, resume what was killed, report at the end what failed."""
    home = Path.cwd() if Path("train.py").is_file() and Path("configs").is_dir() else HERE
    plan = Plan(
        protocol,
        tuple(hosts),
        tuple(datasets),
        tuple(seeds),
        tuple(shots),
        source,
        root.absolute(),
        output.absolute(),
        config,
        tuple(options),
        home,
    )
    if plan_only:
        for run in (run for chain in plan.chains() for run in chain):
            print(shlex.join(["python", *train_py(home), *run.arguments]))
        return
    failures = sweep(plan, jobs, launcher, gpus_per_run=gpus_per_run)
    print(f"runs are in {plan.output}; spotlighter report {shlex.quote(str(output))} makes their table")
    if failures:
        raise typer.Exit(1)
