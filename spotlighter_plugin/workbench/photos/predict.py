"""`spotlighter predict RUN PICTURES`: what a trained run sees on pictures."""

import csv
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...files import pictures_below, write_aside
from ..progress import Steps

BATCH, READERS = 32, 4
SHOWN = 20  # rows on the screen

app = typer.Typer(add_completion=False)


class Answer(NamedTuple):
    """What is on a picture: class names, most probable first, and their probabilities; or why it cannot be read."""

    picture: Path
    names: list[str]
    probabilities: list[float]
    unreadable: str = ""


@app.command()
def command(
    run: Annotated[Path, typer.Argument(help="folder of a finished training")],
    pictures: Annotated[list[Path], typer.Argument(help="files, or folders of them")],
    top: Annotated[int, typer.Option(min=1, help="how many classes to name")] = 5,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="write all answers there")] = None,
    attach: Annotated[bool, typer.Option("--attach", help="put Spotlighter around a host trained without it")] = False,
) -> None:
    """Name what is on pictures. The run's own photographs are not needed, but for --attach."""
    from ..training.saved import load_run

    files = listed(pictures)
    if csv_file and not csv_file.absolute().parent.is_dir():
        raise FileNotFoundError(f"--csv {csv_file}: there is no such folder")
    answers = []
    with Steps(len(files)) as steps:
        steps.say(f"loading {run}")
        loaded = load_run(run, attach)
        steps.say("naming pictures")
        for answer in answered(loaded, files, top):
            answers.append(answer)
            steps.advance()
    console = Console()
    console.print(_table(answers))
    lost = [answer for answer in answers if answer.unreadable]
    if lost:
        print(f"{len(lost)} of {len(files)} pictures cannot be read:")
        for answer in lost:
            print(f"  {answer.unreadable}")
    if len(lost) == len(files):
        raise ValueError(f"none of the {len(files)} pictures can be read")
    if csv_file:
        write_aside(csv_file, lambda file: file.write(_csv(answers)), "--csv")
        print(f"{len(answers) - len(lost)} answers are in {csv_file}")
    else:
        print("next: --csv FILE keeps the answers")


def predict(run, pictures: Iterable, top: int = 5, attach: bool = False) -> list[Answer]:
    """Answers for files and folders of them; ``run`` is a finished training's folder or what ``load_run`` gives.

    Raises: FileNotFoundError, ValueError, one line: no such run, no such picture, no picture at all.
    """
    from ..training.saved import TrainedRun, load_run

    files = listed(pictures)
    return list(answered(run if isinstance(run, TrainedRun) else load_run(run, attach), files, top))


def listed(pictures: Iterable) -> list[Path]:
    """Files as they are given, folders by the pictures in them; each once."""
    found = {}
    pictures = [Path(each) for each in pictures]
    for path in pictures:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such picture or folder")
        found |= dict.fromkeys(pictures_below(path) if path.is_dir() else [path])
    if not found:
        raise ValueError(f"no picture in {', '.join(map(str, pictures))}")
    return list(found)


def answered(run, files: list[Path], top: int) -> Iterator[Answer]:
    """An answer for each file in turn, with the ``top`` classes, all where there are fewer."""
    import torch

    top = min(top, len(run.class_names))
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(files), BATCH):
            chunk = files[start : start + BATCH]
            images = list(readers.map(lambda path: _read(run, path), chunk))
            readable = [image for image in images if not isinstance(image, str)]
            said = iter(zip(*run.probabilities(torch.stack(readable)).topk(top), strict=True) if readable else ())
            for path, image in zip(chunk, images, strict=True):
                if isinstance(image, str):
                    yield Answer(path, [], [], image)
                else:
                    values, classes = next(said)
                    yield Answer(path, [run.class_names[c] for c in classes.tolist()], values.tolist())


def _read(run, path):
    """A tensor (3, h, w), or why there is none."""
    try:
        return run.read(path)
    except OSError as error:
        return str(error)


def _table(answers):
    table = Table("picture", "class", title=f"the first {SHOWN}" if len(answers) > SHOWN else None)
    table.add_column("%", justify="right")
    table.add_column("or")
    for answer in answers[:SHOWN]:
        cells = [f"{100 * value:.1f}" for value in answer.probabilities] or [""]
        rest = zip(answer.names[1:], cells[1:], strict=True)
        name = answer.names[0] if answer.names else "cannot be read"
        table.add_row(_plain(answer.picture), _plain(name), cells[0], _plain(", ".join(map(" ".join, rest))))
    return table


def _plain(text):
    return Text(str(text).encode("utf-8", "replace").decode(), overflow="fold")


def _csv(answers):
    """A row a picture; of what cannot be read, the name alone."""
    count = max(len(answer.names) for answer in answers)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["picture", *(f"{what}_{n + 1}" for n in range(count) for what in ("class", "probability"))])
    for answer in answers:
        pairs = zip(answer.names, answer.probabilities, strict=True)
        said = [cell for name, value in pairs for cell in (name, f"{value:.6f}")]
        rows.writerow([answer.picture, *said, *[""] * (2 * count - len(said))])
    return text.getvalue().encode("utf-8", "surrogateescape")
