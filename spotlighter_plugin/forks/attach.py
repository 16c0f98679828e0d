"""`spotlighter attach DIR`: Spotlighter in a fork of CoOp, MaPLe, PromptKD or CLIPFit, and out of it again.

Attaching copies a trainer and its configuration and adds a few lines to train.py. These lines stand in patches/, one
diff per upstream host that `git apply --unidiff-zero` takes, too. Its line numbers are right for the upstream commit
alone, so `attach` goes by what follows them: the heading of a hunk says next to which line its lines belong, as a
regular expression. Added lines and copied files are recognised by their text, so nothing has to be kept about a fork.
"""

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..compat import ROOT

_HUNK = re.compile(r"@@ .+ @@ (before the first|after the first|after the last) line that matches (.+)")
_REGISTERED = re.compile(r"^@TRAINER_REGISTRY\.register\(\)\s*^class\s+(\w+)", re.M)


@dataclass(frozen=True)
class Host:
    """An upstream host, the names under which forks register its trainer, and what it is given."""

    name: str
    registered: tuple[str, ...]

    @property
    def trainer(self) -> str:
        return f"{self.name}Spotlighter"

    @property
    def module(self) -> str:
        return f"{self.name.lower()}_spotlighter"

    @property
    def files(self) -> tuple[str, ...]:
        """What is copied, as paths both here and in the fork."""
        return f"trainers/{self.module}.py", f"configs/trainers/{self.trainer}/vit_b16.yaml"

    def read(self, path: str) -> bytes:
        """A file of this repository."""
        if not (ROOT / path).is_file():
            raise FileNotFoundError(f"{ROOT / path} is missing: install Spotlighter with pip install -e REPOSITORY")
        return (ROOT / path).read_bytes()

    @property
    def insertions(self) -> list["Insertion"]:
        """The hunks of the host's diff."""
        found = []
        for line in self.read(f"patches/{self.name.lower()}.diff").decode().splitlines():
            if hunk := _HUNK.fullmatch(line):
                found.append(Insertion(*hunk.groups(), lines=[]))
            elif line.startswith("+") and found:
                found[-1].lines.append(line[1:])
        return found


@dataclass(frozen=True)
class Insertion:
    """Lines to add to train.py, and where."""

    where: str
    anchor: str
    lines: list[str]

    def index(self, lines: list[str]) -> int | None:
        """Index in `lines` of the line before which these belong; None if nothing matches."""
        found = [i for i, line in enumerate(lines) if re.match(self.anchor, line)]
        if not found:
            return None
        return found[0] if self.where == "before the first" else found[-1 if "last" in self.where else 0] + 1


# A fork has the trainers of what it was forked from: the youngest comes first.
HOSTS = (
    Host("PromptKD", ("PromptKD",)),
    Host("MaPLe", ("MaPLe",)),
    Host("CLIPFit", ("ClipFit", "CLIPFit")),
    Host("CoOp", ("CoOp",)),
)


def recognise(folder: Path) -> tuple[Host, str]:
    """The host that the fork in `folder` adds, and the module of the fork that registers it.

    Raises:
        ValueError: the folder holds no such fork; the line says what was looked for and what is there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if (folder / "spotlighter_plugin").is_dir():
        raise ValueError(f"{folder} is Spotlighter itself, whose trainers are there already: name a fork")
    if not (folder / "train.py").is_file():
        below = next(folder.glob("*/train.py"), None)
        hint = f"; did you mean {below.parent}?" if below else ""
        raise ValueError(f"{folder} is no fork of CoOp, MaPLe, PromptKD or CLIPFit: it has no train.py{hint}")
    script, trainers = (folder / "train.py").read_text(errors="replace"), {}
    for path in sorted((folder / "trainers").glob("*.py")):
        if re.search(rf"^(from|import) trainers\b.*\b{path.stem}\b", script, re.M):
            trainers |= dict.fromkeys(_REGISTERED.findall(path.read_text(errors="replace")), f"trainers.{path.stem}")
    for host in HOSTS:
        for name in host.registered:
            if name in trainers:
                return host, trainers[name]
    there = f"its train.py imports {', '.join(sorted(trainers))}" if trainers else "its train.py imports no trainer"
    raise ValueError(f"{folder} is no fork of CoOp, MaPLe, PromptKD or CLIPFit: {there}")


def plan_attach(folder: Path, host: Host) -> dict[Path, bytes | None]:
    """What attaching writes: new contents by path, none where everything is in place.

    Raises:
        ValueError: train.py differs from upstream's or was patched by hand, or a file is in the way.
    """
    changes = {}
    for name in host.files:
        path, content = folder / name, host.read(name)
        if path.is_file() and path.read_bytes() != content:
            raise ValueError(f"{path} is there already and is not Spotlighter's present one: move it away first")
        if not path.is_file():
            changes[path] = content
    script = folder / "train.py"
    lines, newline = _read_lines(script)
    ours = [line for insertion in host.insertions for line in insertion.lines]
    present = [line for line in ours if line in lines]
    if present != ours:
        number = next((n for n, line in enumerate(lines, 1) if "spotlighter" in line.lower()), None)
        if number:
            raise ValueError(
                f"{script}:{number} was patched by hand ({lines[number - 1].strip()}): take what is Spotlighter's "
                f"out, or complete them: {_by_hand(host)}"
            )
        changes[script] = _inserted(script, lines, newline, host)
    return changes


def plan_detach(folder: Path, host: Host) -> tuple[dict[Path, bytes | None], list[str]]:
    """What detaching writes (None: deletes), and a line about each thing that is left because it was changed."""
    changes, left = {}, []
    for name in host.files:
        path = folder / name
        if path.is_file() and path.read_bytes() == host.read(name):
            changes[path] = None
        elif path.is_file():
            left.append(f"{path}: changed since it was copied")
    script = folder / "train.py"
    lines, newline = _read_lines(script)
    ours = {line for insertion in host.insertions for line in insertion.lines}
    kept = [line for line in lines if line not in ours]
    if kept != lines:
        changes[script] = newline.join(kept).encode("latin-1")
    left += [f"{script}: {line.strip()}" for line in kept if "spotlighter" in line.lower()]
    return changes, left


def _read_lines(path: Path) -> tuple[list[str], str]:
    """Lines and newline; latin-1 gives every byte back as it was."""
    text = path.read_bytes().decode("latin-1")
    newline = "\r\n" if "\r\n" in text else "\n"
    return text.split(newline), newline


def _inserted(script: Path, lines: list[str], newline: str, host: Host) -> bytes:
    differs = ValueError(f"{script} differs from upstream's and is left as it is. Add by hand: {_by_hand(host)}")
    places = [(insertion.index(lines), insertion.lines) for insertion in host.insertions]
    if any(index is None for index, _ in places):
        raise differs
    for index, added in sorted(places, reverse=True):
        lines = [*lines[:index], *added, *lines[index:]]
    content = newline.join(lines).encode("latin-1")
    try:
        compile(content, str(script), "exec")
    except SyntaxError:
        raise differs from None
    return content


def _by_hand(host: Host) -> str:
    files = " and ".join(f"copy {ROOT / name} to {name}" for name in host.files)
    lines = "; ".join(f"{i.where} line like `{i.anchor}`: {' | '.join(i.lines)}" for i in host.insertions)
    return f"in train.py, {lines}; {files}"


def commit(changes: dict[Path, bytes | None]) -> None:
    """Write and delete files, all of them or none.

    Raises:
        PermissionError, OSError: one line; everything is as it was.
    """
    aside, before, made, done = {}, {}, [], []
    try:
        for path, content in changes.items():
            if path.exists():
                before[path] = _copy_beside(path)
            if content is not None:
                for parent in reversed([p for p in path.parents if not p.exists()]):
                    parent.mkdir()
                    made.append(parent)
                aside[path] = _copy_beside(path, content)
        for path in changes:
            if path in aside:
                os.replace(aside[path], path)
            else:
                path.unlink()
            done.append(path)
    except OSError as error:
        for path in done:
            if path in before:
                os.replace(before[path], path)
            else:
                path.unlink()
        _discard(aside, before)
        for folder in reversed(made):
            folder.rmdir()
        raise type(error)(f"{error.filename or path}: {error.strerror}; nothing was changed") from error
    _discard(aside, before)
    for path, content in changes.items():
        if content is None and not any(path.parent.iterdir()):
            path.parent.rmdir()


def _copy_beside(path: Path, content: bytes | None = None) -> Path:
    """A file next to `path` with `content`, or with its own, with the permissions of `path`."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with open(handle, "wb") as file:
        file.write(path.read_bytes() if content is None else content)
    if path.exists():
        shutil.copystat(path, name)
        if content is not None:
            os.utime(name)
    else:
        os.chmod(name, 0o644)
    return Path(name)


def _discard(*groups: dict[Path, Path]) -> None:
    for copies in groups:
        for path in copies.values():
            path.unlink(missing_ok=True)


app = typer.Typer(add_completion=False)


@app.command()
def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a checkout of CoOp, MaPLe, PromptKD or CLIPFit")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and do nothing")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="undo it")] = False,
):
    """Put Spotlighter into a fork: its trainer, its configuration, and a few lines in the fork's train.py."""
    host, module = recognise(folder)
    changes, left = plan_detach(folder, host) if detach else (plan_attach(folder, host), [])
    print(f"{folder}: a fork of {host.name} ({module})")
    if not dry_run:
        commit(changes)
    for path, content in changes.items():
        if path.name != "train.py":
            print(f"  {'deleted' if content is None else 'created'} {path.relative_to(folder)}")
            continue
        print(f"  {'removed from' if detach else 'added to'} train.py")
        for insertion in host.insertions:
            place = "" if detach else f"  ({insertion.where} line that matches {insertion.anchor})"
            print("\n".join(f"    {'-' if detach else '+'} {line}" for line in insertion.lines) + place)
    for line in left:
        print(f"  left as it is: {line}")
    if not changes:
        print("  nothing to do: " + ("not attached" if detach else "attached already"))
    if dry_run:
        print("  (dry run: nothing was changed)")
    elif not detach:
        print(f"run it in {folder}:\n  {_example(host)}")


def _example(host: Host) -> str:
    config = host.files[1]
    return (
        f"python train.py --root DATA --trainer {host.trainer} --dataset-config-file configs/datasets/dtd.yaml "
        f"--config-file {config} --output-dir output/dtd DATASET.NUM_SHOTS 16"
    )
