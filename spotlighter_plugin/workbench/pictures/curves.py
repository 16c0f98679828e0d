"""Accuracy against an option: points read from files of results, and drawn (Figures 4-7)."""

import csv
import io
import itertools
import json
import re
from pathlib import Path

from .figures import figure

SYMBOLS = {"top_k": "k", "alpha": "α", "beta": "β", "lambda1": "λ1", "lambda2": "λ2", "lambda3": "λ3"}


def read_points(path: Path, x: str = "", y: str = "", by: str = "") -> list[tuple[str, str, float, float, float]]:
    """Points (what x is, line, x, y, deviation of y) of a file of results.

    A CSV of `spotlighter ablate` or `report` needs no columns named: its x is the number in the method's name
    ("top_k 8") or the number of shots. Of any other CSV, or JSON list of objects, `x` and `y` name columns (several:
    comma), and `by` the column that tells lines apart. Raises ValueError or FileNotFoundError with one line.
    """
    rows = _read_rows(path)
    if not x:
        points = [point for row in rows if (point := _reported(row))]
        if not points:
            raise ValueError(f"{path} is no CSV of spotlighter ablate or report: name its columns with --x and --y")
        return points
    points, heights = [], (y or "HM").split(",")
    for across, up in itertools.product(x.split(","), heights):
        for name in filter(None, (across, up, by)):
            if all(name not in row for row in rows):
                raise ValueError(f"{path} has no column {name!r}: take {', '.join(rows[0])}")
        for row in rows:
            if all(row.get(name) not in (None, "") for name in (across, up)):
                line = " ".join([str(row.get(by))] * bool(by) + [up] * (not by or len(heights) > 1))
                points.append((across, line, _number(row[across], path), _number(row[up], path), 0.0))
    if not points:
        raise ValueError(f"{path} has no row with both {x} and {y or 'HM'}")
    return points


def draw_curves(
    points: list[tuple[str, str, float, float, float]], path: Path, log_x: bool = False, ylabel: str = "accuracy, %"
) -> None:
    """A panel for each quantity on x, a line for each name, a band of one standard deviation."""
    panels = list(dict.fromkeys(point[0] for point in points))
    names = len({point[1] for point in points})
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if names > 5 else {}  # they would hide the lines
    with figure(path, (7 if beside else 4.2) * len(panels), 3.4, ncols=len(panels), squeeze=False) as axes:
        for ax, panel in zip(axes.flat, panels, strict=True):
            for line in dict.fromkeys(point[1] for point in points if point[0] == panel):
                chosen = sorted(point[2:] for point in points if point[:2] == (panel, line))
                across, up, deviation = (list(values) for values in zip(*chosen, strict=True))
                (drawn,) = ax.plot(across, up, marker="o", label=line)
                if any(deviation):
                    low, high = zip(*((v - d, v + d) for v, d in zip(up, deviation, strict=True)), strict=True)
                    ax.fill_between(across, low, high, color=drawn.get_color(), alpha=0.15)
            ax.set(xlabel=SYMBOLS.get(panel, panel), ylabel=ylabel)
            ax.legend(fontsize=8, **beside)
            values = sorted({point[2] for point in points if point[0] == panel})
            if log_x and values[-1] > 0:  # zero has a place left of the smallest
                ax.set_xscale("symlog", linthresh=next(value for value in values if value > 0))
                ax.set_xticks(values, [f"{value:g}" for value in values])


def _read_rows(path):
    try:
        text = Path(path).read_text(encoding="utf-8")
        rows = json.loads(text) if Path(path).suffix == ".json" else list(csv.DictReader(io.StringIO(text)))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is neither CSV nor JSON ({' '.join(str(error).split())[:80]})") from None
    rows = rows if isinstance(rows, list) else [rows]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no rows of named columns")
    return rows


def _reported(row):
    """A row of report's CSV as a point, None for one that has no x, no value, or averages a part of the data sets."""
    if (row.get("missing") or "").endswith("sets"):
        return None
    try:
        mean, deviation = float(row["mean"]), float(row["std"] or 0)
        by_name = re.fullmatch(r"(\w+) (-?[\d.]+)", row["method"])
        by_shots = re.fullmatch(r"(\d+)-shot", row["column"])
    except (KeyError, TypeError, ValueError):
        return None
    if by_shots:
        return f"shots, {row['title']}", row["method"], float(by_shots[1]), mean, deviation
    return (by_name[1], row["column"], float(by_name[2]), mean, deviation) if by_name else None


def _number(value, path):
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{path}: {value!r} is no number") from None
