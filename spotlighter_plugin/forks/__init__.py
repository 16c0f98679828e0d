"""Spotlighter in somebody's fork: attach, run, and what forks need on today's PyTorch.

`import spotlighter_plugin.forks`, as attached forks have it, applies today.py where a fork's own script is what runs.
"""

import sys
from pathlib import Path


def is_fork(folder: Path) -> bool:
    """Whether train.py and trainers/ are there, as in CoOp, and the folder is not this repository."""
    has = {name: (folder / name).exists() for name in ("train.py", "trainers", "spotlighter_plugin")}
    return has["train.py"] and has["trainers"] and not has["spotlighter_plugin"]


if Path(sys.argv[0]).is_file() and is_fork(Path(sys.argv[0]).parent):
    from . import today  # noqa: F401
