"""Figures as files: drawn without a display, written aside, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...files import write_aside

FORMATS = (".png", ".svg", ".pdf")


def check_path(flag: str, path: Path) -> None:
    """Raise a one-line error unless a figure can be written to ``path``; ``flag`` is the option that named it."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{flag} {path}: unknown format {path.suffix!r}, take {', '.join(FORMATS)}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{flag} {path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{flag} {path}: cannot write to {folder}")


@contextmanager
def figure(path: Path, width: float, height: float, **subplots) -> Iterator:
    """Axes (or an array of them, as of matplotlib's ``subplots``) that are saved to ``path`` at the end."""
    path = Path(path)
    drawing, axes = _matplotlib().subplots(figsize=(width, height), layout="constrained", **subplots)
    try:
        yield axes
        kind = path.suffix.lower().lstrip(".")
        write_aside(path, lambda file: drawing.savefig(file, format=kind, dpi=150), "file")
    finally:
        _matplotlib().close(drawing)


def _matplotlib():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
