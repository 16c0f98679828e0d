"""Spotlighter in somebody's fork: attach, run, and what forks need on today's PyTorch.

`import spotlighter_plugin.forks`, as attached forks have it, applies today.py where a fork's own script is what runs.
"""

import sys
from pathlib import Path


def is_fork(folder: Path) -> bool:
    """Whether train.py and trainers/ are there, as in CoOp, or what was attached; this repository is none."""
    if not (folder / "train.py").exists() or (folder / "spotlighter_plugin").exists():
        return False
    return (folder / "trainers").exists() or any(folder.glob("*/*_spotlighter.py"))


if Path(sys.argv[0]).is_file() and is_fork(Path(sys.argv[0]).parent):
    from . import today  # noqa: F401
    from .run import offer_trainers

    offer_trainers(makes=False)
