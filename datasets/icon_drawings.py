"""The bundled drawings of IconScenes: 28 different ones of each concept, for shots, validation and testing."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).with_name("icons")
SIDE = 64  # px
SPLITS = {"shots": slice(0, 16), "val": slice(16, 20), "test": slice(20, 28)}
HELD = 28
COLUMNS = 28  # of the sheet of colours


@lru_cache
def index() -> dict:
    """What is bundled: concepts, each drawing's set and name there, the sets' authors and licences, figures."""
    return json.loads((FOLDER / "icons.json").read_text(encoding="utf-8"))


def concepts() -> list[str]:
    """The classes' names as one would prompt them, sorted."""
    return list(index()["concepts"])


def _tiles(name: str, mode: str) -> np.ndarray:
    """A sheet's tiles (rows, columns, 64, 64[, 4]) uint8."""
    with Image.open(FOLDER / name) as sheet:
        a = np.asarray(sheet.convert(mode))
    rows, columns = a.shape[0] // SIDE, a.shape[1] // SIDE
    return a.reshape(rows, SIDE, columns, SIDE, *a.shape[2:]).swapaxes(1, 2)


@lru_cache
def drawings(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The drawings of a split, "shots", "val" or "test": ink (C, n, 64, 64) uint8 and colours (C, n, 64, 64, 4) uint8.

    Ink is coverage, 0 where there is nothing and 255 where the pen was full on. Colours are RGBA and all zero for a
    drawing that has none of its own. ``C`` is in the order of ``concepts()``; n is 16, 4 and 8.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: one of {', '.join(SPLITS)}")
    which = SPLITS[split]
    ink = _tiles("ink.webp", "L")[:, which].copy()
    colour = np.zeros((*ink.shape, 4), np.uint8)
    tiles = _tiles("colour.webp", "RGBA").reshape(-1, SIDE, SIDE, 4)
    rows = np.array([[-1 if k is None else k for k in row] for row in index()["colour"]])[:, which]
    colour[rows >= 0] = tiles[rows[rows >= 0]]
    ink.setflags(write=False)
    colour.setflags(write=False)
    return ink, colour
