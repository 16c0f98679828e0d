"""`spotlighter ablate`: one ablation of the paper, its variants swept base-to-new and set side by side.

Variants are trailing options of train.py; where the paper prints figures, a variant has the name of their row.
"""

import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..reports.report import FORMATS, PAPER, Accuracies, Table, base2new_average, datasets_of
from ..reports.results import find_results
from ..training.runs import config_files
from .launch import LAUNCHERS
from .plan import HERE, ICONS, Plan, Run
from .sweep import ListOptions, sweep

KEY = "TRAINER.SPOTLIGHTER."
ALL_LOSSES = ("gra_low", "gra_high", "reg_text", "kl_visual", "local")


def _each(option, values):
    """{value: one option} for a hyper-parameter."""
    return {f"{option.lower()} {value}": (KEY + option, str(value)) for value in values}


def _switch(option):
    return {"without": (KEY + option, "False"), "with": (KEY + option, "True")}


def _backbones(*names):
    return {name: ("MODEL.BACKBONE.NAME", name) for name in names}


def _without(loss):
    return KEY + "LOSSES", str(tuple(each for each in ALL_LOSSES if each != loss))


ABLATIONS = {
    "V": {
        "L_cls alone": (KEY + "LOSSES", "()"),
        **{f"without {loss.removeprefix('gra_')}": _without(loss) for loss in ALL_LOSSES},
        "all losses": (KEY + "LOSSES", str(ALL_LOSSES)),
    },
    "VI": {f"lev{levels}": (KEY + "LEVELS", levels) for levels in ("1", "2", "1+2")},
    "VIII": _switch("SEMANTIC_ACTIVATION"),
    "X": _backbones("ViT-B/16", "ViT-L/14"),
    "XI": {
        name: (KEY + "MAPPING", name) for name in ("linear+linear", "transformer+transformer", "transformer+linear")
    },
    "XII": _switch("RECALCULATE"),
    "figure4": _each("TOP_K", (4, 8, 16, 32, 64)),
    "figure5a": _each("ALPHA", (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)),
    "figure5b": _each("BETA", (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)),
    "figure6a": _each("LAMBDA1", (0.0, 0.002, 0.02, 0.2, 2.0)),
    "figure6b": _each("LAMBDA2", (0.0, 2.0, 20.0, 200.0)),
    "figure6c": _each("LAMBDA3", (0.0, 0.01, 0.1, 1.0, 10.0)),
}


@dataclass(frozen=True)
class Ablation:
    """The plans of an ablation's variants; to `sweep` it is one plan.

    Raises: ValueError with one line for an unknown ablation, and as `Plan`.
    """

    name: str
    plan: Plan

    def variants(self) -> dict[str, Plan]:
        """{variant's name: its Plan}."""
        if self.name not in ABLATIONS:
            raise ValueError(f"unknown ablation {self.name!r}: take {', '.join(ABLATIONS)}")
        variants, plans = ABLATIONS[self.name], {}
        if self.name == "X" and self.plan.datasets and set(self.plan.datasets) <= {"icons", *ICONS}:
            from ...towers.clip import BUNDLED

            variants = _backbones(*BUNDLED)
        for variant, options in variants.items():
            folder = "".join(c if c.isalnum() or c in "+-." else "_" for c in variant)
            output = Path(self.plan.output, "ablation", self.name, folder)
            plans[variant] = replace(self.plan, output=output, options=(*self.plan.options, *options))
        return plans

    def _check_that_it_varies(self):
        """Raises ValueError where what the variants set changes nothing beside the other options."""
        from yacs.config import CfgNode

        from ...config import extend_cfg, from_cfg

        variants = ABLATIONS[self.name].values()
        options = [*self.plan.options, *list(variants)[-1]]
        pairs = list(zip(options[::2], options[1::2], strict=False))
        for host in self.plan.hosts:
            cfg = CfgNode({"TRAINER": {}})
            extend_cfg(cfg)
            file = config_files(self.plan.home, host).get(self.plan.config)
            if file:  # one that is missing is named by the plan
                written = CfgNode.load_cfg(file.read_text()).get("TRAINER", {}).get("SPOTLIGHTER", CfgNode())
                cfg.TRAINER.SPOTLIGHTER.merge_from_other_cfg(written)
            cfg.merge_from_list([part for pair in pairs if pair[0].startswith(KEY) for part in pair])
            if idle := set(from_cfg(cfg).idle()) & {option for option, _ in variants}:
                raise ValueError(
                    f"ablation {self.name} varies {idle.pop()}, which nothing reads here: add -- {KEY}PRESET paper, "
                    f"and {KEY}LOSSES where --config {self.plan.config} leaves them out"
                )

    def chains(self) -> list[list[Run]]:
        variants = self.variants().values()
        self._check_that_it_varies()
        return list(itertools.chain.from_iterable(plan.chains() for plan in variants))

    @property
    def protocol(self) -> str:
        return f"ablation {self.name}"

    @property
    def home(self) -> Path:
        return self.plan.home

    def tables(self) -> list[Table]:
        """For each host a table of Base, Novel and HM, averaged over the data sets, a row a variant."""
        rows = {}
        for variant, plan in self.variants().items():
            accuracies = Accuracies(find_results([plan.output]))
            family = datasets_of(accuracies)
            printed = PAPER.get(self.name, {"rows": {}})["rows"].get(variant, [])
            paper = [value for value in printed if isinstance(value, float)][:3] or [None] * 3
            for host in accuracies.methods:
                cells = base2new_average(accuracies, host, family, paper)
                rows.setdefault((host, ", ".join(family)), []).append((variant, cells))
        paper = PAPER.get(self.name, {"page": 0, "title": self.name})
        return [
            Table(
                self.name, paper["page"], f"{paper['title']}. Here: {host} on {where}", ["Base", "Novel", "HM"], found
            )
            for (host, where), found in rows.items()
        ]


app = typer.Typer(add_completion=False)


@app.command(cls=ListOptions)
def command(
    name: Annotated[str, typer.Argument(help=", ".join(ABLATIONS))],
    options: Annotated[list[str], typer.Argument(help="after --: KEY VALUE options for every run")] = (),
    hosts: Annotated[list[str], typer.Option(help="trainers with Spotlighter")] = ("CoOpSpotlighter",),
    datasets: Annotated[list[str], typer.Option(help="names of configs/datasets")] = ("icon_scenes",),
    seeds: Annotated[list[int], typer.Option()] = (1, 2, 3),
    config: Annotated[str, typer.Option(help="name of configs/trainers/<host>/<name>.yaml")] = "default",
    root: Annotated[Path, typer.Option(help="folder of the data sets")] = Path("data"),
    output: Annotated[Path, typer.Option(help="folder of the runs")] = Path("output"),
    jobs: Annotated[int, typer.Option(help="runs at once")] = 1,
    validation: Annotated[
        bool, typer.Option("--validation", help="to choose by: inside the base classes of IconScenes, no test image")
    ] = False,
    launcher: Annotated[str, typer.Option(help=", ".join(LAUNCHERS))] = "here",
    format: Annotated[str, typer.Option(help=", ".join(FORMATS))] = "text",
) -> None:
    """Run one ablation of the paper (resumed and skipped as by sweep) and print its table."""
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: take {', '.join(FORMATS)}")
    plan = Plan(
        "base2new",
        tuple(hosts),
        tuple(datasets),
        tuple(seeds),
        root=root.absolute(),
        output=output.absolute(),
        config=config,
        options=tuple(options),
        home=HERE,
        validation=validation,
    )
    ablation = Ablation(name, plan)
    failures = sweep(ablation, jobs, launcher, Console(file=sys.stderr))  # standard output is the table's alone
    print(FORMATS[format](ablation.tables()), end="")
    after = f"spotlighter ablate {name} --format csv > {name}.csv && spotlighter visualize curves {name}.csv"
    print(f"runs are in {output / 'ablation' / name}; as curves: {after}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)
