"""`spotlighter report`: the paper's tables with one's own figures beside the paper's.

Accuracies are percentages. Means and standard deviations (population, as CoOp's parse_test_res.py) are over seeds; a
harmonic mean is that of the mean base and new accuracies; averages are over data sets.
"""

import csv
import io
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from .results import find_results

PAPER = json.loads(Path(__file__).with_name("paper_results.json").read_text(encoding="utf-8"))["tables"]
ELEVEN = [name for name in PAPER["I"]["blocks"] if name != "Average"]
VARIANTS = PAPER["III"]["columns"][1:]
ICONS = ["IconScenes", "IconScenesInverted", "IconScenesColour", "IconScenesPixel", "IconScenesDark"]
FAMILIES = {"Average": ELEVEN, "IconScenes average": ICONS}
NUMBERS = ("I", "II", "III", "IV", "VII", "cross-dataset")
BENCHED = {"coop": "CoOp", "maple": "MaPLe", "promptkd": "PromptKD", "clipfit": "CLIPFit"}


@dataclass(frozen=True)
class Cell:
    """A mean with what it lacks: `missing` is e.g. "2/3" (seeds) or "7/11 sets", "" if nothing."""

    mean: float | None = None
    std: float | None = None
    missing: str = ""
    paper: float | str | None = None
    text: str = ""

    def __str__(self):
        if self.text or (self.mean is None and not self.missing):
            return self.text or "–"
        if self.mean is None:
            return f"incomplete {self.missing}"
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        return f"{self.mean:.2f}{spread}" + (f" (incomplete {self.missing})" if self.missing else "")


@dataclass
class Table:
    """One table or one block of it. rows: (method, one Cell a column); page: the paper's, 0 if it has no such table."""

    number: str
    page: int
    title: str
    columns: list
    rows: list = field(default_factory=list)


class Accuracies:
    """{seed: accuracy}, None where a run is incomplete, of each (method, data set, kind, shots or source)."""

    def __init__(self, results):
        self.cells = {}
        for r in results:
            detail = {"few": r.shots, "cross": r.source}.get(r.kind)
            cell = self.cells.setdefault((r.method, r.dataset, r.kind, detail), {})
            cell[r.seed] = cell.get(r.seed) if r.accuracy is None else r.accuracy
        self.methods = sorted({r.method for r in results})

    def get(self, method, dataset, kind, detail=None) -> dict[int, float | None]:
        """A copy; zero-shot CLIP's accuracy on all classes stands for any number of shots and for any source."""
        found = self.cells.get((method, dataset, kind, detail))
        if found is None and kind in ("few", "cross"):
            found = self.cells.get((method, dataset, "zero", None))
        return dict(found or {})

    def seeds(self, method, *kinds) -> set[int]:
        """The seeds with which a method was run in a protocol: what a complete cell has."""
        of_zero = {"zero"} if {"few", "cross"} & set(kinds) else set()
        wanted = set(kinds) | of_zero
        return {seed for key, cell in self.cells.items() if key[0] == method and key[2] in wanted for seed in cell}

    def datasets(self, *kinds) -> set[str]:
        return {key[1] for key in self.cells if key[2] in kinds}


def harmonic(one, two) -> float:
    return 2 * one * two / (one + two) if one + two else 0.0


def _cell(values, expected, paper=None, centre=None, missing=""):
    """A Cell of {seed: value or None} for the expected seeds."""
    done = [value for value in values.values() if value is not None]
    if values and len(done) < len(expected):
        missing = missing or f"{len(done)}/{len(expected)}"
    if not done:
        return Cell(missing=missing, paper=paper)
    mean = statistics.fmean(done) if centre is None else centre
    return Cell(mean, statistics.pstdev(done) if len(done) > 1 else None, missing, paper)


def _averaged(per_dataset, family):
    """({seed: average}, what is missing) over a family of data sets."""
    have = [name for name in family if any(v is not None for v in per_dataset[name].values())]
    if not have:
        return {}, f"0/{len(family)} sets" if any(per_dataset.values()) else ""
    seeds = sorted({seed for name in have for seed in per_dataset[name]})
    values = {
        seed: statistics.fmean(per_dataset[name][seed] for name in have)
        if all(per_dataset[name].get(seed) is not None for name in have)
        else None
        for seed in seeds
    }
    return values, "" if len(have) == len(family) else f"{len(have)}/{len(family)} sets"


def _base_new_hm(base, new, expected, paper, missing=("", "")):
    """The cells Base, Novel and HM of two {seed: accuracy}."""
    both = {seed for seed in base if base[seed] is not None and new.get(seed) is not None}
    each = {seed: harmonic(base[seed], new[seed]) if seed in both else None for seed in base.keys() | new.keys()}
    means = [statistics.fmean(part[seed] for seed in both) for part in (base, new)] if both else None
    return [
        _cell(base, expected, paper[0], missing=missing[0]),
        _cell(new, expected, paper[1], missing=missing[1]),
        _cell(each, expected, paper[2], harmonic(*means) if means else None, max(missing)),
    ]


def _rows_of(paper, accuracies, kinds):
    """The paper's methods in its order, then the others that were run."""
    ran = [m for m in accuracies.methods if any(key[0] == m and key[2] in kinds for key in accuracies.cells)]
    return [*paper, *(method for method in ran if method not in paper)]


def _families(accuracies, *kinds):
    """The averages to show: of each family of which something was run."""
    return {name: family for name, family in FAMILIES.items() if accuracies.datasets(*kinds) & set(family)}


def datasets_of(accuracies) -> list[str]:
    """The data sets with base-to-new results, the paper's and IconScenes' in their order."""
    ran = accuracies.datasets("base", "new")
    return [*(name for name in ELEVEN + ICONS if name in ran), *sorted(ran - {*ELEVEN, *ICONS})]


def base2new_average(accuracies, method, family, paper) -> list[Cell]:
    """The cells Base, Novel and HM of a method over a family of data sets; paper: the three printed figures or None."""
    parts = [
        _averaged({name: accuracies.get(method, name, kind) for name in family}, family) for kind in ("base", "new")
    ]
    expected = accuracies.seeds(method, "base", "new")
    return _base_new_hm(parts[0][0], parts[1][0], expected, paper, (parts[0][1], parts[1][1]))


def table_1(accuracies) -> list[Table]:
    """Base-to-new generalization: a block for each average and each data set that was run."""
    tables = []
    for block, family in _families(accuracies, "base", "new").items():
        paper = PAPER["I"]["blocks"].get(block, {})
        rows = [
            (method, base2new_average(accuracies, method, family, paper.get(method, [None] * 3)))
            for method in _rows_of(paper, accuracies, ("base", "new"))
        ]
        tables.append(_table("I", block, PAPER["I"]["columns"], rows))
    for dataset in datasets_of(accuracies):
        paper, rows = PAPER["I"]["blocks"].get(dataset, {}), []
        for method in _rows_of(paper, accuracies, ("base", "new")):
            base, new = (accuracies.get(method, dataset, kind) for kind in ("base", "new"))
            expected = accuracies.seeds(method, "base", "new")
            rows.append((method, _base_new_hm(base, new, expected, paper.get(method, [None] * 3))))
        tables.append(_table("I", dataset, PAPER["I"]["columns"], rows))
    return tables


def table_2(accuracies) -> list[Table]:
    """Few-shot learning: a block for each average, and one for each data set that was run."""
    ran = accuracies.datasets("few")
    shots = sorted({key[3] for key in accuracies.cells if key[2] == "few"} | {1, 2, 4, 8, 16})
    blocks = {**_families(accuracies, "few"), **{name: [name] for name in sorted(ran)}}
    tables = []
    for block, family in blocks.items():
        paper, rows = PAPER["II"]["rows"] if block == "Average" else {}, []
        for method in _rows_of(paper, accuracies, ("few", "zero")):
            printed = dict(zip(PAPER["II"]["columns"], paper.get(method, []), strict=False))
            cells = []
            for k in shots:
                per_dataset = {name: accuracies.get(method, name, "few", k) for name in family}
                values, missing = (per_dataset[block], "") if block in ran else _averaged(per_dataset, family)
                cells.append(_cell(values, accuracies.seeds(method, "few"), printed.get(str(k)), missing=missing))
            rows.append((method, cells))
        tables.append(_table("II", block, [f"{k}-shot" for k in shots], rows))
    return tables


def _transfer(number, accuracies, source, targets, paper, title=""):
    """Trained on `source`, tested there and elsewhere."""
    if not any(key[1] in targets and key[2:] == ("cross", source) for key in accuracies.cells):
        return []
    rows = []
    for method in _rows_of(paper, accuracies, ("cross", "zero")):
        printed, expected = paper.get(method, [None] * (len(targets) + 1)), accuracies.seeds(method, "cross")
        trained = [key[3] for key in accuracies.cells if key[:3] == (method, source, "few")]
        first = accuracies.get(method, source, "few", max(trained, default=None))
        cells = [_cell(first, expected, printed[0])]
        cells += [
            _cell(accuracies.get(method, t, "cross", source), expected, printed[i]) for i, t in enumerate(targets, 1)
        ]
        per_dataset = {name: accuracies.get(method, name, "cross", source) for name in targets}
        values, missing = _averaged(per_dataset, targets)
        rows.append((method, [*cells, _cell(values, expected, missing=missing)]))
    return [_table(number, title, [source, *targets, "Average"], rows)]


def table_3(accuracies) -> list[Table]:
    """Cross-domain generalization from ImageNet, and the same on IconScenes."""
    return [
        *_transfer("III", accuracies, "ImageNet", VARIANTS, PAPER["III"]["rows"]),
        *_transfer("III", accuracies, ICONS[0], ICONS[1:], {}, "IconScenes"),
    ]


def table_cross_dataset(accuracies) -> list[Table]:
    """Trained on ImageNet, tested on the ten other data sets; the paper has no such table."""
    return _transfer("cross-dataset", accuracies, "ImageNet", ELEVEN[1:], {})


def table_4(accuracies, benches) -> list[Table]:
    """Efficiency: images/s from `spotlighter bench --json`, the harmonic mean on ImageNet from the runs."""
    if not benches:
        return []
    ours = {}
    for bench in benches:
        host = BENCHED.get(str(bench["host"]).lower(), bench["host"])
        ours[host] = "", bench["images_per_second_host"]
        ours[f"{host} w/ Spotlighter"] = f"+{bench['extra_parameters']}", bench["images_per_second_spotlighter"]
    paper, rows = PAPER["IV"]["rows"], []
    for method in [*paper, *(name for name in ours if name not in paper)]:
        printed = paper.get(method, [None] * 3)
        added, speed = ours.get(method, ("", None))
        hm = _base_new_hm(
            accuracies.get(method, "ImageNet", "base"),
            accuracies.get(method, "ImageNet", "new"),
            accuracies.seeds(method, "base", "new"),
            printed,
        )[2]
        rows.append((method, [Cell(paper=printed[0], text=added), Cell(speed, paper=printed[1]), hm]))
    return [_table("IV", "", PAPER["IV"]["columns"], rows)]


def table_7(accuracies) -> list[Table]:
    """Each host with and without Spotlighter, and the gain, averaged over data sets."""
    tables = []
    for block, family in _families(accuracies, "base", "new").items():
        paper = {**PAPER["I"]["blocks"]["Average"], **PAPER["VII"]["rows"]} if block == "Average" else {}
        rows = []
        for method in accuracies.methods:
            with_it = f"{method} w/ Spotlighter"
            if with_it not in accuracies.methods:
                continue
            pair = [
                base2new_average(accuracies, name, family, paper.get(name, [None] * 3)) for name in (method, with_it)
            ]
            rows += [(method, pair[0]), (with_it, pair[1]), ("gain", [_gain(a, b) for a, b in zip(*pair, strict=True)])]
        if rows:
            tables.append(_table("VII", block, PAPER["VII"]["columns"], rows))
    return tables


def _gain(without, with_it):
    paper = None if None in (without.paper, with_it.paper) else f"{with_it.paper - without.paper:+.2f}"
    if None in (without.mean, with_it.mean):
        return Cell(paper=paper)
    missing = " (incomplete)" if without.missing or with_it.missing else ""
    return Cell(with_it.mean - without.mean, paper=paper, text=f"{with_it.mean - without.mean:+.2f}{missing}")


def _table(number, block, columns, rows):
    paper = PAPER.get(number, {"page": 0, "title": "Cross-dataset transfer from ImageNet (not in the paper)"})
    title = paper["title"] + (f": {block}" if block else "")
    return Table(number, paper["page"], title, list(columns), rows)


def make_tables(results, benches=(), numbers=()) -> list[Table]:
    """The tables that the results can fill, or those of `numbers`.

    Args:
        results: of `find_results`. benches: dictionaries as `spotlighter bench --json` writes them.
        numbers: of NUMBERS; empty takes all.

    Raises: ValueError for an unknown number, or if nothing in the results belongs to the tables.
    """
    for number in numbers:
        if number not in NUMBERS:
            raise ValueError(f"unknown table {number!r}: take {', '.join(NUMBERS)}")
    accuracies = Accuracies(results)
    made = {
        "I": table_1(accuracies),
        "II": table_2(accuracies),
        "III": table_3(accuracies),
        "IV": table_4(accuracies, benches),
        "VII": table_7(accuracies),
        "cross-dataset": table_cross_dataset(accuracies),
    }
    tables = [table for number in numbers or NUMBERS for table in made[number]]
    if not tables:
        raise ValueError(f"no run for table {', '.join(numbers or NUMBERS)}")
    return tables


# -- formats -----------------------------------------------------------------------------------------------------------


def _heading(table):
    where = f"Table {table.number} (page {table.page})" if table.page else table.number
    return f"{where}. {table.title}"


def _printed(value):
    return "" if value is None else value if isinstance(value, str) else f"{value:.2f}"


def _strings(table):
    """Header and rows of strings, a column of the paper's figures beside each column that has some."""
    paired = [any(cells[i].paper is not None for _, cells in table.rows) for i in range(len(table.columns))]
    header = ["Method"]
    for column, pair in zip(table.columns, paired, strict=True):
        header += [column, "paper"] if pair else [column]
    rows = []
    for method, cells in table.rows:
        row = [method]
        for cell, pair in zip(cells, paired, strict=True):
            row += [str(cell), _printed(cell.paper)] if pair else [str(cell)]
        rows.append(row)
    return header, rows


def as_text(tables) -> str:
    parts = []
    for table in tables:
        header, rows = _strings(table)
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in [header, *rows]
        ]
        parts.append("\n".join([_heading(table), lines[0], "-" * len(lines[0]), *lines[1:]]))
    return "\n\n".join("\n".join(line.rstrip() for line in part.splitlines()) for part in parts) + "\n"


def as_markdown(tables) -> str:
    parts = []
    for table in tables:
        header, rows = _strings(table)
        lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
        parts.append("\n".join([f"**{_heading(table)}**", "", *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def as_latex(tables) -> str:
    """Needs the package booktabs."""

    def escaped(text):
        for plain, command in (("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("±", r"$\pm$"), ("–", "--")):
            text = text.replace(plain, command)
        return text

    parts = []
    for table in tables:
        header, rows = _strings(table)
        lines = [" & ".join(map(escaped, row)) + r" \\" for row in [header, *rows]]
        top = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(_heading(table))}}}"]
        body = [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", lines[0], r"\midrule", *lines[1:]]
        parts.append("\n".join([*top, *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def as_csv(tables) -> str:
    """One line a cell, unrounded."""
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    out.writerow(["table", "title", "method", "column", "mean", "std", "missing", "paper"])
    for table in tables:
        for method, cells in table.rows:
            for column, cell in zip(table.columns, cells, strict=True):
                values = [cell.mean if cell.mean is not None else cell.text, cell.std, cell.missing, cell.paper]
                out.writerow([table.number, table.title, method, column, *values])
    return file.getvalue()


FORMATS = {"text": as_text, "markdown": as_markdown, "csv": as_csv, "latex": as_latex}


def read_benches(paths) -> list[dict]:
    """The JSON files of `spotlighter bench` (bench*.json) below some folders, as a list of dictionaries."""
    found = []
    for file in sorted(file for path in paths for file in Path(path).rglob("bench*.json")):
        try:
            content = json.loads(file.read_text())
            content = content if isinstance(content, list) else [content]
            keys = "host", "images_per_second_host", "images_per_second_spotlighter", "extra_parameters"
            found += [{key: entry[key] for key in keys} for entry in content]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not what `spotlighter bench --json` writes ({error})") from None
    return found


app = typer.Typer(add_completion=False)


@app.command()
def command(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs, ours or upstream's")],
    table: Annotated[list[str], typer.Option(help=f"of {', '.join(NUMBERS)} (default: all that the runs fill)")] = (),
    format: Annotated[str, typer.Option(help=", ".join(FORMATS))] = "text",
    config: Annotated[str, typer.Option(help="only runs of this configuration file, e.g. vit_b16_ep50")] = "",
    output: Annotated[Path | None, typer.Option(help="write to a file")] = None,
) -> None:
    """The paper's tables: mean ± standard deviation over seeds, beside the paper's figures."""
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: take {', '.join(FORMATS)}")
    text = FORMATS[format](make_tables(find_results(runs, config), read_benches(runs), table))
    if output:
        output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    where = f"in {output}" if output else "above (--output FILE)"
    print(f"tables {where}; --format latex for a paper, csv for spotlighter visualize curves", file=sys.stderr)
