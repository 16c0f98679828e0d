"""Files and folders."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from spotlighter_plugin.files import read_picture as read_image
from spotlighter_plugin.files import write_aside

__all__ = ["check_isfile", "listdir_nohidden", "mkdir_if_missing", "read_image", "read_json", "write_json"]


def mkdir_if_missing(dirname) -> None:
    if dirname:
        os.makedirs(dirname, exist_ok=True)


def check_isfile(fpath) -> bool:
    """True when `fpath` is a file; warns otherwise."""
    found = os.path.isfile(fpath)
    if not found:
        warnings.warn(f"no file at {fpath}", stacklevel=2)
    return found


def listdir_nohidden(path, sort=False) -> list[str]:
    """Names in the folder that do not begin with a dot, in the file system's order or sorted."""
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    return sorted(names) if sort else names


def read_json(fpath) -> Any:
    with open(fpath, encoding="utf-8") as file:
        return json.load(file)


def write_json(obj, fpath) -> None:
    """Write aside, then rename: a reader never sees half a file."""
    Path(fpath).parent.mkdir(parents=True, exist_ok=True)
    write_aside(fpath, lambda file: file.write(json.dumps(obj, indent=4).encode()))
