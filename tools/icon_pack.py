"""The drawings for pre-training in three small files: ink in 16 levels, colours as 15 of each drawing's own, an index.

``load_pack`` needs numpy alone.
"""

import json
import lzma
import os
from pathlib import Path

import numpy as np

SIDE, COLOURS = 64, 15


def _pack4(a: np.ndarray) -> np.ndarray:
    a = a.reshape(len(a), -1, 2)
    return a[..., 0] << 4 | a[..., 1]


def _unpack4(a: np.ndarray) -> np.ndarray:
    return np.stack([a >> 4, a & 15], -1).reshape(len(a), SIDE, SIDE)


def _write(path: Path, raw: bytes) -> None:
    aside = path.with_suffix(".part")
    aside.write_bytes(raw)
    os.replace(aside, path)


def save_pack(folder: Path, ink: np.ndarray, colour: np.ndarray, index: dict) -> None:
    """ink (N, 64, 64) uint8; colour (P, 64, 64, 4) uint8, where ``index["colour_row"]`` points; see ``load_pack``."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 26}]
    levels = (ink.astype(np.uint16) * 15 + 127) // 255
    _write(folder / "ink.xz", lzma.compress(_pack4(levels.astype(np.uint8)).tobytes(), filters=filters))
    planes, palettes = np.zeros((len(colour), SIDE, SIDE), np.uint8), np.zeros((len(colour), 16, 3), np.uint8)
    for i, rgba in enumerate(colour):
        q = Image.fromarray(rgba[..., :3]).quantize(COLOURS, dither=Image.Dither.NONE)
        planes[i] = np.where(rgba[..., 3] < 96, 0, np.asarray(q) + 1)
        own = np.array(q.getpalette()[: 3 * COLOURS], np.uint8).reshape(-1, 3)
        palettes[i, 1 : len(own) + 1] = own
    _write(folder / "colour.xz", lzma.compress(_pack4(planes).tobytes() + palettes.tobytes(), filters=filters))
    _write(folder / "index.json.xz", lzma.compress(json.dumps(index, separators=(",", ":")).encode()))


def load_pack(folder: str | Path) -> dict:
    """What pre-training draws from.

    names: list of str, as one would prompt them; sets, styles: lists of str. For each of the N drawings: ink
    (N, 64, 64) uint8 (16 levels, 0..255), name, set, style: (N,) int into those lists, eval: (N,) int, the index into
    ``concepts`` (the evaluated concepts, sorted) or -1, colour_row: (N,) int into colour or -1. colour (P, 64, 64)
    uint8: 0 where there is nothing, else a row of palette (P, 16, 3) uint8; ``rgba`` unfolds some of them.
    """
    folder = Path(folder)
    index = json.loads(lzma.decompress((folder / "index.json.xz").read_bytes()))
    n = len(index["name"])
    raw = np.frombuffer(lzma.decompress((folder / "ink.xz").read_bytes()), np.uint8)
    pack = {"ink": _unpack4(raw.reshape(n, -1)) * np.uint8(17)}
    raw = np.frombuffer(lzma.decompress((folder / "colour.xz").read_bytes()), np.uint8)
    p = len(raw) // (SIDE * SIDE // 2 + 48)
    pack["colour"] = _unpack4(raw[: p * SIDE * SIDE // 2].reshape(p, -1))
    pack["palette"] = raw[p * SIDE * SIDE // 2 :].reshape(p, 16, 3)
    for key in ("names", "sets", "styles", "concepts"):
        pack[key] = index[key]
    for key in ("name", "set", "style", "eval", "colour_row"):
        pack[key] = np.array(index[key])
    return pack


def rgba(pack: dict, rows: np.ndarray) -> np.ndarray:
    """Colours (n, 64, 64, 4) uint8 of rows of ``colour``."""
    planes = pack["colour"][rows]
    rgb = pack["palette"][rows][np.arange(len(planes))[:, None, None], planes]
    return np.concatenate([rgb, 255 * (planes > 0)[..., None].astype(np.uint8)], -1)
