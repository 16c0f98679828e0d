"""Zero-shot accuracy on the bundled tower against the share of the host's operations, without a memory.

    python -m spotlighter_plugin.workbench.speed.accuracy --out results/operations.json --picture docs/operations.png

Schedules: selection by CLS's attention before block s, the same with random tokens, merging alone, EViT's three cuts,
merging before selecting, and what `spotlighter bench` times on a ViT-B/16, which has as many blocks and tokens. Each is
run on the same validation drawings of all classes, and compared with the host scene by scene. What is in --out is not
run again; --show runs nothing. With --dtype, rows in half precision stand beside, compared with the host in fp32.
"""

import json
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ...compat import ROOT
from ...config import PLACING, SpotlighterConfig
from ...files import write_aside
from ...method import schedule
from ...method.schedule import Step, Tower, operations, rivals
from ...towers.clip import apply_precision, load_clip
from ...wrapper import SpotlighterWrapper
from ..training.settings import import_trainers_and_datasets
from .bench_hosts import DTYPES, shape_of

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PLAIN = {"mapping": "none", "losses": (), "prototype_logits": False, "activation": "attention"}
UNPLACED = {"merge": 0, "stages": (), "share": 0.0}
KEPT = {2: (64, 98, 147), 4: (32, 64, 98), 6: (16, 32, 64), 8: (8, 32, 64), 10: (16, 48), 11: (8, 32)}
EVIT = (0.5, 0.6, 0.7, 0.8)  # share of the tokens that each of three cuts keeps
MERGED = (4, 8, 12, 16, 20, 24)  # tokens a block
MERGED_THEN_CUT = ((32, 5, 68), (26, 6, 66), (21, 8, 49), (16, 9, 48), (14, 8, 64), (17, 11, 16))  # r, s, k
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
DOMAINS = "source,pixel"
TIMED = (0.5, 0.7)  # shares of a ViT-B/16's operations that documents time
FILE = ROOT / "results" / "operations.json"


class Row(NamedTuple):
    """Of one schedule: share of the operations, right answers, those minus the host's with their 95 % interval, and
    answers that are the host's; all but the share in percent."""

    name: str
    share: float
    right: float
    minus_host: float
    low: float
    high: float
    same: float


def tower_of(backbone: str) -> Tower:
    """A vision tower by a name of ``bench_hosts.SHAPES``, or by numbers as there."""
    shape = shape_of(backbone)
    return Tower(shape.tokens, shape.layers, shape.width, shape.width // 64, shape.dim, shape.patch)


BUNDLED = tower_of("tiny")


def schedules() -> dict[str, dict]:
    """Options by name."""
    n_tokens, n_blocks, timed = BUNDLED.tokens, BUNDLED.blocks, tower_of("ViT-B/16")
    found = {}
    for block, kept in KEPT.items():
        for k in kept:
            found[f"select, s = {block}, k = {k}"] = {"select_block": block, "top_k": k}
    for block, k in ((4, 98), (6, 64), (8, 32)):
        found[f"random, s = {block}, k = {k}"] = {"select_block": block, "top_k": k, "activation": "random"}
    for r in MERGED:
        found[f"merge, r = {r}"] = {"select_block": n_blocks - 1, "top_k": n_tokens, "merge": r}
    for share in EVIT:
        first, second, third = (int(n_tokens * share**i) for i in (1, 2, 3))
        found[f"EViT, {share}"] = {"select_block": 9, "top_k": third, "stages": ((3, first), (6, second))}
    for r, block, k in MERGED_THEN_CUT:
        found[f"merge, then select, r = {r}, s = {block}, k = {k}"] = {"select_block": block, "top_k": k, "merge": r}
    for share in SHARES:
        found[f"merge, then select, {share}"] = {"share": share}
    for share in TIMED:
        steps = SpotlighterConfig(share=share).steps(timed)
        ours, others = share_of(steps), rivals(operations(timed, steps) / operations(timed), timed)
        ways = {"merge, then select": ours, "random": ours | {"activation": "random"}}
        ways |= {"merge, r": others["merging"], "EViT": others["evit"]}
        found |= {f"{name}, as a ViT-B/16 at {share}": way for name, way in ways.items()}
    return found


def share_of(steps: list[Step]) -> dict:
    """The option that places these steps in the bundled tower: what they cost there."""
    return {"share": operations(BUNDLED, steps) / operations(BUNDLED)}


def on_bundled(config: SpotlighterConfig, tower: Tower) -> dict | None:
    """Options with which the bundled tower runs a configuration made for ``tower``: the very same blocks and tokens if
    it has as many, else the same share of the operations. None if only explicit numbers say where it cuts another
    tower, or if training or prototypes have a say in its answers."""
    if config.mapping != "none" or config.semantic_activation or config.levels != "1+2":
        return None
    is_alike = (tower.tokens, tower.blocks) == (BUNDLED.tokens, BUNDLED.blocks)
    if not (is_alike or config.share):
        return None
    if config.share:
        placed = share_of(config.steps(tower)) if is_alike else {"share": config.share}
    else:
        placed = {name: getattr(config, name) for name in PLACING}
    return placed | {"activation": config.activation, "fuse_dropped": config.fuse_dropped}


def read(path: Path = FILE) -> dict:
    """Labels of the scenes, and by schedule answers and share of the operations; empty where there is no file."""
    return json.loads(path.read_text()) if path.exists() else {"labels": [], "answers": {}, "shares": {}}


def find(kept: dict, config: SpotlighterConfig, tower: Tower, dtype: str = "fp32", run: bool = False) -> Row | None:
    """The accuracy of a configuration made for ``tower``, beside the host in fp32; None if it is not among ``kept`` and
    not to be run, or if the bundled tower cannot run it. What is run is added to ``kept``."""
    options = on_bundled(config, tower)
    if options is None:
        return None
    same = (named(name, dtype) for name, way in ways().items() if way == way_of(options))
    name = next((name for name in same if name in kept["answers"]), "")
    if not name and run:
        name = named(str(options), dtype)
        for each, *given in (("host", None, "fp32"), (name, options, dtype)):
            if each not in kept["answers"]:
                add(kept, each, *given)
    return row(kept, name) if name else None


def named(schedule: str, dtype: str) -> str:
    """A schedule's row in a precision."""
    return schedule if dtype == "fp32" else f"{schedule}, {dtype}"


def config_of(options: dict) -> SpotlighterConfig:
    return SpotlighterConfig(**PLAIN | ({} if "share" in options else UNPLACED) | options)


def way_of(options: dict) -> tuple:
    """What tells schedules apart."""
    config = config_of(options)
    return config.activation, tuple(config.steps(BUNDLED))


@cache
def ways() -> dict[str, tuple]:
    return {name: way_of(options) for name, options in schedules().items()}


@cache
def scenes(domains: str = DOMAINS, each: int = 1) -> tuple[torch.Tensor, list[int]]:
    """Normalized validation scenes (n, 3, 112, 112) of all classes, and their classes."""
    import_trainers_and_datasets()
    from datasets import icon_scenes

    asked = [("val", c, d, n) for c in range(len(icon_scenes.concepts())) for d in range(4) for n in range(each)]
    images = np.concatenate([icon_scenes.render(domain, asked) for domain in domains.split(",")])
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    normalized = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return normalized, [scene[1] for scene in asked] * len(domains.split(","))


@torch.no_grad()
def add(kept, name, options: dict | None, dtype: str = "fp32", backbone: str = "tiny", given=None) -> None:
    """Run one schedule, the host's own if None, and keep the class of each scene and the share of operations.

    given: other ``scenes``.
    """
    images, kept["labels"] = given or scenes()
    from datasets import icon_scenes

    options = options or {"select_block": BUNDLED.blocks - 1, "top_k": BUNDLED.tokens}
    model = apply_precision(load_clip(backbone), dtype)
    wrapper = SpotlighterWrapper(model, config_of(options), class_names=icon_scenes.concepts()).eval()
    tower = wrapper.adapter.layout.tower(wrapper.adapter.dim)
    kept["answers"][name] = torch.cat([wrapper(few).argmax(1) for few in images.split(50)]).tolist()
    kept["shares"][name] = operations(tower, wrapper.steps) / operations(tower)


def row(kept: dict, name: str) -> Row:
    """What the answers say, the interval from classes resampled."""
    labels, host, mine = (np.array(each) for each in (kept["labels"], kept["answers"]["host"], kept["answers"][name]))
    difference = 100.0 * ((mine == labels).astype(float) - (host == labels))
    by_class = np.stack([difference[labels == c].mean() for c in np.unique(labels)])
    means = by_class[np.random.default_rng(0).integers(0, len(by_class), (2000, len(by_class)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    numbers = 100 * (mine == labels).mean(), difference.mean(), low, high, 100 * (mine == host).mean()
    return Row(name, kept["shares"][name], *map(float, numbers))


def draw(found: list[Row], path: Path) -> None:
    """Right answers, and answers that are the host's, against the share of operations."""
    from ..pictures.figures import figure

    kinds = {"select": "o", "random": "x", "merge, r": "s", "EViT": "^", "merge, then select": "D"}
    with figure(path, 9, 4, ncols=2) as both:
        for axes, column, label in zip(both, ("right", "same"), ("right, %", "host's answer, %"), strict=True):
            for kind, mark in kinds.items():
                points = sorted(
                    (row.share, getattr(row, column))
                    for row in found
                    if row.name.startswith(kind) and not row.name.endswith(DTYPES)
                )
                line = "-" if mark in "s^" else "none"
                axes.plot(*zip(*points, strict=True), ls=line, marker=mark, label=kind.removesuffix(", r"))
            axes.axhline(next(getattr(row, column) for row in found if row.name == "host"), color="black", lw=0.8)
            axes.set(xlabel="share of the host's operations", ylabel=label)
        axes.legend()


def main(
    out: Annotated[Path, typer.Option(help="JSON of what was run")],
    picture: Annotated[Path | None, typer.Option(help="PNG, SVG or PDF to draw")] = None,
    show: Annotated[bool, typer.Option("--show", help="run nothing")] = False,
    backbone: Annotated[str, typer.Option(help="bundled tower or file")] = "tiny",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "fp32",
    only: Annotated[str, typer.Option(help="run schedules that have this in their names")] = "",
    domains: Annotated[str, typer.Option(help="domains of the scenes")] = DOMAINS,
    each: Annotated[int, typer.Option(help="scenes of each validation drawing and domain")] = 1,
    among: Annotated[
        int, typer.Option(help="times r tokens among which pairs are looked for; 999: all, as in ToMe")
    ] = schedule.CENTRAL,
) -> None:
    kept, other = read(out), "" if among == schedule.CENTRAL else f", among {among} r"
    schedule.CENTRAL = among
    asked = {"host": None, **{name + other: options for name, options in schedules().items() if only in name}}
    for name, options in () if show else track(asked.items(), "schedules"):
        if named(name, dtype) not in kept["answers"]:
            add(kept, named(name, dtype), options, dtype, backbone, scenes(domains, each))
            write_aside(out, lambda file: file.write(json.dumps(kept).encode()), "--out")
    found = [row(kept, name) for name in kept["answers"]]
    table = Table("schedule", "operations", "right", "minus host", "95 %", "same answer")
    for name, share, right, minus, low, high, same in sorted(found, key=lambda row: row.share):
        ends = f"{low:+.1f} to {high:+.1f}"
        table.add_row(name, f"{share:.2f}", f"{right:.1f}", f"{minus:+.1f}", ends, f"{same:.1f}")
    Console().print(table)
    if picture:
        draw(found, picture)


if __name__ == "__main__":
    typer.run(main)
