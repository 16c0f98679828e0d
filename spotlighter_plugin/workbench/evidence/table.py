"""The table of evidence from finished rows: records for a file, tables for a screen."""

import numpy as np
from rich.console import Console
from rich.table import Table

from .judge import FIGURES, figures, interval, resampled
from .results import Key, Results

DIFFERENCES = {"difference": "hm", "difference_new": "new", "difference_one_space": "one_space_hm"}
AVERAGE = "average"


def records(
    results: Results, methods: list[str], datasets: list[str], seeds: list[int], source=None, shots: int = 16
) -> list:
    """What `--json` writes: accuracies by method and data set, and differences of the last method to every other.

    Only methods with every one of the seeds on every one of the data sets are listed.

    source: where methods were trained; None: each on the data set that it is judged on.
    """
    keys = {m: [Key(m, d, source or d, s, shots) for d in datasets for s in seeds] for m in methods}
    keys = {m: cells for m, cells in keys.items() if cells and all(key in results.facts for key in cells)}
    if not keys:
        return []
    found, trained_on = [], {} if source is None else {"trained_on": source}
    for method, cells in keys.items():
        facts = results.facts[cells[0]]
        mine = {d: [figures(results.answers[k], results.exams[d]) for k in cells if k.dataset == d] for d in datasets}
        means = {
            d: {name: float(np.mean([row[name] for row in every])) for name in FIGURES} for d, every in mine.items()
        }
        means[AVERAGE] = {name: float(np.mean([row[name] for row in means.values()])) for name in FIGURES}
        found += [
            {
                "method": method, "dataset": dataset, **{name: round(x, 3) for name, x in row.items()},
                **{name: facts[name] for name in ("operations_ratio", "trained", "memory_mb")},
                "seeds": len(seeds), **trained_on,
            }
            for dataset, row in means.items()
        ]  # fmt: skip
    if methods[-1] in keys:
        found += [{**record, **trained_on} for record in _differences(results, keys, methods[-1], found)]
    return found


def _differences(results: Results, keys: dict, ours: str, found: list) -> list:
    cells = [key for every in keys.values() for key in every]
    drawn = resampled([results.answers[key] for key in cells], [results.exams[key.dataset] for key in cells])
    size, order = len(keys[ours]), list(keys)
    mean = {(r["method"], name): r[name] for r in found if r["dataset"] == AVERAGE for name in FIGURES}
    lines = []
    for kind, name in DIFFERENCES.items():
        averages = drawn[name].reshape(len(drawn[name]), len(order), size).mean(2)  # (draws, methods)
        for i, other in enumerate(order):
            if other != ours:
                between = mean[ours, name] - mean[other, name]
                _, low, high = interval(averages[:, order.index(ours)], averages[:, i], between)
                numbers = {"mean": round(between, 3), "low": round(low, 3), "high": round(high, 3)}
                lines.append({kind: name, "of": ours, "to": other, **numbers})
    return lines


def show(found: list, console: Console, title: str) -> None:
    """Print what `records` gave: accuracies on average, HM by data set, what it costs, differences."""
    lines = [record for record in found if "method" in record]
    if not lines:
        return
    average = [record for record in lines if record["dataset"] == AVERAGE]
    datasets = list(dict.fromkeys(record["dataset"] for record in lines))[:-1]
    heading = f"{title}: {', '.join(datasets)}; seeds: {lines[0]['seeds']}"
    _print(console, f"{heading}; own halves, then one label space", ["base", "new", "HM", "base", "new", "HM"], [
        [r["method"], *(f"{r[name]:.1f}" for name in FIGURES)] for r in average
    ])  # fmt: skip
    for name, what in (("hm", "HM of own halves"), ("one_space_hm", "HM in one label space")):
        cell = {(r["method"], r["dataset"]): f"{r[name]:.1f}" for r in lines}
        for part in (datasets[i : i + 6] for i in range(0, len(datasets), 6)):
            _print(console, what, part, [[r["method"], *(cell[r["method"], d] for d in part)] for r in average])
    _print(console, "what it costs", ["operations", "numbers trained", "MB kept"], [
        [r["method"], f"{r['operations_ratio']:.2f}", f"{r['trained']:,}", f"{r['memory_mb']:.2f}"] for r in average
    ])  # fmt: skip
    gaps = [record for record in found if "of" in record]
    if gaps:
        others = list(dict.fromkeys(record["to"] for record in gaps))
        cell = {
            (r["to"], kind): f"{r['mean']:+.2f} ({r['low']:+.2f} … {r['high']:+.2f})"
            for r in gaps for kind in DIFFERENCES if kind in r
        }  # fmt: skip
        _print(console, f"{gaps[0]['of']} minus …, with 95 % intervals that resample classes",
               ["HM", "new", "HM in one label space"],
               [[other, *(cell[other, kind] for kind in DIFFERENCES)] for other in others])  # fmt: skip


def _print(console: Console, title: str, columns: list[str], lines: list[list[str]]) -> None:
    table = Table("method", title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
