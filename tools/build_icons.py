"""Draw the icons of IconScenes from the package ``@iconify/json`` on npm.

    pip install resvg-py==0.5.0 && npm pack @iconify/json@2.2.535 && tar xzf iconify-json-2.2.535.tgz
    python tools/build_icons.py --package package --work DIR --pack DIR
    python tools/build_icons.py --check

``--work`` keeps all drawings (1.5 GB), ``--pack`` gets those for pre-training (``tools/icon_pack.py`` reads them) and
``datasets/icons`` those held out for evaluation. What is drawn and what is not is said in ``tools/icon_choice.json``;
which drawings are held out is written in ``datasets/icons/icons.json``, and what is written there is drawn. With
``--choose`` they are chosen anew, by limits, so one pixel that is rendered otherwise may choose another drawing.
``--check`` measures on the bundled files that no test drawing has a near copy among shots or validation.
"""

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets import icon_drawings as bundle
from tools import icon_art as art
from tools import icon_names as naming
from tools import icon_splits as splits
from tools.icon_pack import save_pack

MANY = 9  # families that draw a name, from which all of its variants are drawn
PART = 500  # drawings a process takes at a time
COLOURS = 48  # of a bundled palette drawing
SEED = 0


def collect(package: Path) -> tuple[dict, dict]:
    """{name: {set: icons}} of every set whose licence allows it, less what is left out; {set: palette?, size}."""
    choice = naming.choice()
    out = {s for sets in choice["sets left out"].values() for s in sets}
    by, sets = defaultdict(lambda: defaultdict(list)), {}
    for prefix, info in sorted(json.loads((package / "collections.json").read_text(encoding="utf-8")).items()):
        if info["license"]["spdx"] not in choice["licences"] or prefix in out:
            continue
        data = json.loads((package / "json" / f"{prefix}.json").read_text(encoding="utf-8"))
        size = {k: data[k] for k in ("left", "top", "width", "height") if k in data}
        sets[prefix] = bool(info.get("palette")), size
        ends, starts = tuple(data.get("suffixes") or ()), tuple(data.get("prefixes") or ())
        for icon in sorted(data["icons"]):
            name = naming.normal(prefix, icon, ends, starts)
            if not data["icons"][icon].get("hidden") and not naming.left_out(name):
                by[name][prefix].append((icon, data["icons"][icon]))
    return by, sets


def pick(icons: list, palette: bool, every: bool) -> list:
    """Of one set's icons of one name: up to 8, or the plainest of each style."""
    order = sorted(icons, key=lambda i: (len(i[0]), i[0]))
    if every:
        return order[:8]
    first: dict = {}
    for icon in order:
        first.setdefault(naming.style(icon[0], palette), icon)
    return list(first.values())


def jobs(package: Path) -> list[tuple]:
    """(name, set, icon's name, icon, its set's size, style) of all that two families draw, sorted."""
    by, sets = collect(package)
    out = []
    for name in sorted(by):
        families = len({naming.family(p) for p in by[name]})
        for prefix in sorted(by[name]) if families > 1 else ():
            palette, size = sets[prefix]
            for icon, data in pick(by[name][prefix], palette, families >= MANY):
                out.append((name, prefix, icon, data, size, naming.style(icon, palette)))
    return out


def draw(some: list[tuple]) -> tuple:
    """-> rows (name, set, icon's name, style, coloured?), ink, colours of the coloured ones, masks, silhouettes."""
    rows, ink, colours, alphas = [], [], [], []
    for name, prefix, icon, data, size, style in some:
        try:
            rgba = art.render(data, size)
        except (ValueError, OSError):  # what the renderer refuses
            continue
        if rgba is None or ((drawn := art.ink(rgba)) > 128).sum() < 60:
            continue
        coloured = art.coloured(rgba)
        rows.append((name, prefix, icon, "palette" if coloured else style, coloured))
        ink.append(art.levels(drawn))
        alphas.append(rgba[..., 3])
        if coloured:
            colours.append(rgba)
    side = (art.SIDE, art.SIDE)
    ink, alphas = np.array(ink, np.uint8).reshape(-1, *side), np.array(alphas, np.uint8).reshape(-1, *side)
    return rows, ink, np.array(colours, np.uint8).reshape(-1, *side, 4), art.masks(ink), art.silhouettes(alphas)


def draw_all(package: Path, work: Path) -> None:
    """Draw everything with two processes; ``work`` gets rows.json, written last, and four arrays."""
    todo = jobs(package)
    print(f"{len(todo)} icons of {len({j[0] for j in todo})} names", flush=True)
    work.mkdir(parents=True, exist_ok=True)
    got = []
    with ProcessPoolExecutor(2) as pool:
        for part in pool.map(draw, [todo[i : i + PART] for i in range(0, len(todo), PART)]):
            got.append(part)
            if len(got) % 20 == 0:
                print(f"{len(got) * PART} drawn", flush=True)
    for i, what in enumerate(("ink", "colour", "mask", "silhouette"), 1):
        np.save(work / f"{what}.npy", np.concatenate([g[i] for g in got]))
    (work / "rows.json").write_text(json.dumps([r for g in got for r in g[0]]))


def nearest(a: np.ndarray, b: np.ndarray) -> float:
    """Largest cosine of a mask of ``a`` with one of ``b`` or its mirror image."""
    return max((float(splits.similar(a, b[i : i + 4096]).max()) for i in range(0, len(b), 4096)), default=0.0)


def check() -> dict:
    """Measured on the bundled files: over all concepts, the nearest shots and validation come to a test drawing."""
    masks = {s: art.masks(bundle.drawings(s)[0].reshape(-1, art.SIDE, art.SIDE)) for s in bundle.SPLITS}
    return {
        "test to shots": round(nearest(masks["test"], masks["shots"]), 4),
        "test to val": round(nearest(masks["test"], masks["val"]), 4),
        "val to shots": round(nearest(masks["val"], masks["shots"]), 4),
        "limit": art.COPY,
    }


def sheet(tiles: np.ndarray, columns: int) -> Image.Image:
    """Tiles (n, 64, 64[, 4]) as one picture, ``columns`` a row."""
    rest = -len(tiles) % columns
    tiles = np.concatenate([tiles, np.zeros((rest, *tiles.shape[1:]), np.uint8)])
    a = tiles.reshape(-1, columns, *tiles.shape[1:]).swapaxes(1, 2)
    return Image.fromarray(a.reshape(a.shape[0] * art.SIDE, columns * art.SIDE, *tiles.shape[3:]))


def few_colours(rgba: np.ndarray) -> np.ndarray:
    """The drawing with 48 colours and 16 levels of coverage: a fifth of the bytes, and nothing that one sees."""
    rgb = Image.fromarray(rgba[..., :3]).quantize(COLOURS, dither=Image.Dither.NONE).convert("RGB")
    alpha = art.levels(rgba[..., 3:])
    return np.concatenate([np.asarray(rgb) * (alpha > 0), alpha], -1)


def written(rows: list) -> dict:
    """{concept: {split: ids}} of the drawings that the bundle names. Raises ValueError for one that was not drawn."""
    index = bundle.index()
    at = {f"{prefix}:{icon}": i for i, (_, prefix, icon, *_) in enumerate(rows)}
    if missing := [name for row in index["drawings"] for name in row if name not in at]:
        raise ValueError(f"{missing[0]} is held out and was not drawn: take {index['package']}, or --choose")
    names = sorted(naming.choice()["concepts"], key=naming.prompt)
    if [naming.prompt(name) for name in names] != index["concepts"]:
        raise ValueError("the concepts of icon_choice.json are not those of icons.json: --choose")
    ids = np.array([[at[name] for name in row] for row in index["drawings"]])
    return {name: {s: row[where] for s, where in bundle.SPLITS.items()} for name, row in zip(names, ids, strict=True)}


def write_bundle(package: Path, out: Path, rows: list, ink, colour, at, held: dict, figures: dict) -> None:
    """``out``: ink.webp (a row a concept), colour.webp, icons.json."""
    info = json.loads((package / "collections.json").read_text(encoding="utf-8"))
    names = sorted(held, key=naming.prompt)
    ids = np.array([np.concatenate([held[n][s] for s in bundle.SPLITS]) for n in names])
    coloured = ids[at[ids] >= 0]
    place = {int(i): k for k, i in enumerate(coloured)}
    out.mkdir(parents=True, exist_ok=True)
    for name, tiles in (
        ("ink.webp", ink[ids.ravel()]),
        ("colour.webp", np.stack([few_colours(colour[at[i]]) for i in coloured])),
    ):
        sheet(tiles, bundle.HELD).save(out / f"{name}.part", "WEBP", lossless=True, quality=100, method=6, exact=True)
        os.replace(out / f"{name}.part", out / name)
    sets = sorted({rows[i][1] for i in ids.ravel()})
    index = {
        "package": f"@iconify/json {json.loads((package / 'package.json').read_text())['version']}",
        "seed": SEED,
        "splits": {s: [w.start, w.stop] for s, w in bundle.SPLITS.items()},
        "concepts": [naming.prompt(n) for n in names],
        "figures": figures,
        "sets": {
            p: {
                "name": info[p]["name"],
                "author": info[p]["author"]["name"],
                "url": info[p]["author"].get("url", ""),
                "licence": info[p]["license"]["spdx"],
            }
            for p in sets
        },
        "drawings": [[f"{rows[i][1]}:{rows[i][2]}" for i in row] for row in ids],
        "colour": [[place.get(int(i)) for i in row] for row in ids],
    }
    text = json.dumps(index, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + re.sub(r"\s*\n\s*", " ", m[1]) + "]", text)
    (out / "icons.json").write_text(text + "\n", encoding="utf-8")


def write_pack(folder: Path, rows: list, ink, colour, at, pre: dict) -> None:
    """The drawings left for pre-training, name by name."""
    names = sorted(pre, key=naming.prompt)
    ids = np.concatenate([pre[n] for n in names])
    evaluated = sorted((n for n in names if n in set(naming.choice()["concepts"])), key=naming.prompt)
    sets, styles = sorted({rows[i][1] for i in ids}), ["outline", "solid", "duotone", "palette"]
    of_set, of_concept = {s: k for k, s in enumerate(sets)}, {n: k for k, n in enumerate(evaluated)}
    coloured = ids[at[ids] >= 0]
    row = np.full(len(rows), -1)
    row[coloured] = np.arange(len(coloured))
    index = {
        "names": [naming.prompt(n) for n in names],
        "concepts": [naming.prompt(n) for n in evaluated],
        "sets": sets,
        "styles": styles,
        "name": np.repeat(np.arange(len(names)), [len(pre[n]) for n in names]).tolist(),
        "set": [of_set[rows[i][1]] for i in ids],
        "style": [styles.index(rows[i][3]) for i in ids],
        "eval": [of_concept.get(rows[i][0], -1) for i in ids],
        "colour_row": row[ids].tolist(),
    }
    save_pack(folder, ink[ids], np.stack([colour[at[i]] for i in coloured]), index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--package", type=Path, help="the unpacked package @iconify/json")
    parser.add_argument("--work", type=Path, help="where all drawings are kept; what is there is not drawn again")
    parser.add_argument("--pack", type=Path, help="where the drawings for pre-training go")
    parser.add_argument("--out", type=Path, default=bundle.FOLDER, help="where the drawings held out go")
    parser.add_argument("--choose", action="store_true", help="choose anew what is held out")
    parser.add_argument("--check", action="store_true", help="measure the bundled drawings; exit 1 on a near copy")
    args = parser.parse_args()
    if args.check:
        found = check()
        print(json.dumps(found))
        raise SystemExit(max(v for k, v in found.items() if k != "limit") >= art.COPY)
    if not (args.package and args.work):
        parser.error("--package and --work say where the package lies and where the drawings go")
    if not (args.work / "rows.json").is_file():
        draw_all(args.package, args.work)
    rows = json.loads((args.work / "rows.json").read_text())
    ink, colour, mask, silhouette = (np.load(args.work / f"{w}.npy") for w in ("ink", "colour", "mask", "silhouette"))
    at = np.where([r[4] for r in rows], np.cumsum([r[4] for r in rows]) - 1, -1)
    concepts = sorted(naming.choice()["concepts"])
    held = splits.choose(rows, mask, silhouette, concepts, SEED) if args.choose else written(rows)
    pre, figures = splits.left_to_learn(rows, mask, silhouette, held, SEED)
    left = mask[np.concatenate(list(pre.values()))]
    for s in bundle.SPLITS:
        those = mask[np.concatenate([h[s] for h in held.values()])]
        figures[f"{s} to pre-training"] = round(nearest(those, left), 5)
    of_concepts = sorted(len(pre[n]) for n in held)
    figures |= {
        "pre-training drawings": len(left),
        "pre-training names": len(pre),
        "of evaluated concepts": sum(of_concepts),
        "fewest of a concept": of_concepts[0],
        "median of a concept": of_concepts[len(of_concepts) // 2],
    }
    print(json.dumps(figures, indent=1), flush=True)
    if args.pack:
        write_pack(args.pack, rows, ink, colour, at, pre)
    write_bundle(args.package, args.out, rows, ink, colour, at, held, figures)


if __name__ == "__main__":
    main()
