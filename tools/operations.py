"""Zero-shot accuracy on the bundled tower against the share of the host's operations, without a memory.

    python tools/operations.py --out results/operations.json --picture docs/operations.png      # --show prints it

Schedules: selection by CLS's attention before block s, the same with random tokens, merging alone, EViT's three cuts,
and merging before selecting. Each is run on the same validation drawings of all classes, and compared with the host
scene by scene. What is in --out is not run again.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import icon_scenes  # noqa: E402
from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper  # noqa: E402
from spotlighter_plugin.method.schedule import operations  # noqa: E402
from spotlighter_plugin.towers.clip import load_clip  # noqa: E402

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PLAIN = {"mapping": "none", "losses": (), "prototype_logits": False, "activation": "attention"}
UNPLACED = {"merge": 0, "stages": (), "share": 0.0}
KEPT = {2: (64, 98, 147), 4: (32, 64, 98), 6: (16, 32, 64), 8: (8, 32, 64), 10: (16, 48), 11: (8, 32)}
EVIT = (0.5, 0.6, 0.7, 0.8)  # share of the tokens that each of three cuts keeps
MERGED = (4, 8, 12, 16)  # tokens a block
MERGED_THEN_CUT = ((32, 5, 68), (26, 6, 66), (21, 8, 49), (16, 9, 48), (14, 8, 64))  # r, s, k
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)


def schedules(n_tokens: int, n_blocks: int) -> dict[str, dict]:
    """Options by name."""
    found = {}
    for block, kept in KEPT.items():
        for k in kept:
            found[f"select, s = {block}, k = {k}"] = {"select_block": block, "top_k": k}
    for block, k in ((4, 98), (6, 64), (8, 32)):
        found[f"random, s = {block}, k = {k}"] = {"select_block": block, "top_k": k, "activation": "random"}
    for r in MERGED:
        left = n_tokens - r * (n_blocks - 2)
        found[f"merge, r = {r}"] = {"select_block": n_blocks - 1, "top_k": left, "merge": r}
    for share in EVIT:
        first, second, third = (int(n_tokens * share**i) for i in (1, 2, 3))
        found[f"EViT, {share}"] = {"select_block": 9, "top_k": third, "stages": ((3, first), (6, second))}
    for r, block, k in MERGED_THEN_CUT:
        found[f"merge, then select, r = {r}, s = {block}, k = {k}"] = {"select_block": block, "top_k": k, "merge": r}
    for share in SHARES:
        found[f"merge, then select, {share}"] = {"share": share}
    return found


def size_of(model) -> tuple[int, int]:
    """Patch tokens and blocks."""
    return len(model.visual.positional_embedding) - 1, len(model.visual.transformer.resblocks)


@torch.no_grad()
def answers(model, names: list[str], options: dict | None, scenes: torch.Tensor) -> tuple[list[int], float]:
    """The class of each scene, and the share of operations."""
    n, blocks = size_of(model)
    options = options or {"select_block": blocks - 1, "top_k": n}
    options = PLAIN | ({} if "share" in options else UNPLACED) | options
    wrapper = SpotlighterWrapper(model, SpotlighterConfig(**options), class_names=names).eval()
    tower = wrapper.adapter.layout.tower(wrapper.adapter.dim)
    found = torch.cat([wrapper(few).argmax(1) for few in scenes.split(50)]).tolist()
    share = operations(tower, wrapper.steps) / operations(tower)
    wrapper.detach()
    return found, share


def interval(difference: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """95 % of the mean over scenes, classes resampled."""
    rng = np.random.default_rng(0)
    by_class = np.stack([difference[labels == c].mean() for c in np.unique(labels)])
    means = by_class[rng.integers(0, len(by_class), (2000, len(by_class)))].mean(1)
    return tuple(np.quantile(means, (0.025, 0.975)))


def rows(kept: dict) -> list[tuple]:
    """(name, share, accuracy, minus the host's, low, high, same answers), in percent but for the share."""
    labels, host = np.array(kept["labels"]), np.array(kept["answers"]["host"])
    found = []
    for name, mine in kept["answers"].items():
        mine = np.array(mine)
        difference = 100.0 * ((mine == labels).astype(float) - (host == labels))
        low, high = interval(difference, labels)
        same = 100 * (mine == host).mean()
        found.append((name, kept["shares"][name], 100 * (mine == labels).mean(), difference.mean(), low, high, same))
    return found


def draw(found: list[tuple], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    kinds = {"select": "o", "random": "x", "merge, r": "s", "EViT": "^", "merge, then select": "D"}
    for axis, column, label in zip(figure.subplots(1, 2), (2, 6), ("right, %", "host's answer, %"), strict=True):
        for kind, mark in kinds.items():
            points = sorted((row[1], row[column]) for row in found if row[0].startswith(kind))
            line = "-" if mark in "s^" else ""
            axis.plot(*zip(*points, strict=True), line, marker=mark, label=kind.removesuffix(", r"))
        axis.axhline(next(row[column] for row in found if row[0] == "host"), color="black", lw=0.8)
        axis.set_xlabel("share of the host's operations")
        axis.set_ylabel(label)
    axis.legend()
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=130, format="png")
    os.replace(aside, path)


def main(
    out: Annotated[Path, typer.Option(help="JSON of what was run")],
    picture: Annotated[Path | None, typer.Option(help="PNG to draw")] = None,
    show: Annotated[bool, typer.Option(help="run nothing")] = False,
    backbone: Annotated[str, typer.Option(help="bundled tower or file")] = "tiny",
    domains: Annotated[str, typer.Option(help="domains of the scenes")] = "source,pixel",
    each: Annotated[int, typer.Option(help="scenes of each validation drawing and domain")] = 1,
) -> None:
    names = icon_scenes.concepts()
    kept = json.loads(out.read_text()) if out.exists() else {"labels": [], "answers": {}, "shares": {}}
    if not show:
        model = load_clip(backbone)
        asked = [("val", c, d, n) for c in range(len(names)) for d in range(4) for n in range(each)]
        images = np.concatenate([icon_scenes.render(domain, asked) for domain in domains.split(",")])
        kept["labels"] = [scene[1] for scene in asked] * len(domains.split(","))
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        scenes = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
        for name, options in track({"host": None, **schedules(*size_of(model))}.items(), "schedules"):
            if name not in kept["answers"]:
                kept["answers"][name], kept["shares"][name] = answers(model, names, options, scenes)
                aside = out.with_suffix(".part")
                aside.write_text(json.dumps(kept))
                os.replace(aside, out)
    found = rows(kept)
    table = Table("schedule", "operations", "right", "minus host", "95 %", "same answer")
    for name, share, right, minus, low, high, same in sorted(found, key=lambda row: row[1]):
        ends = f"{low:+.1f} to {high:+.1f}"
        table.add_row(name, f"{share:.2f}", f"{right:.1f}", f"{minus:+.1f}", ends, f"{same:.1f}")
    Console().print(table)
    if picture:
        draw(found, picture)


if __name__ == "__main__":
    typer.run(main)
