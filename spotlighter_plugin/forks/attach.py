"""`spotlighter attach DIR`: Spotlighter in a fork of CoOp or of one of its descendants, and out of it again.

Attaching copies a trainer and its configuration and adds a few lines to train.py. These lines stand in patches/, one
diff per upstream host that `git apply --unidiff-zero` takes, too. Its line numbers are right for the upstream commit
alone, so `attach` goes by what follows them: the heading of a hunk says next to which line its lines belong, as a
regular expression. Added lines and copied files are recognised by their text, so nothing has to be kept about a fork.
A trainer that has no adapter of its own here is given a generic one, by the same lines.
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
SUFFIX = "Spotlighter"
GENERIC = '''"""{name} with Spotlighter: trained by its own step, with Spotlighter attached to the result."""

from dassl.engine import TRAINER_REGISTRY

import {module}  # noqa: F401
from spotlighter_plugin.trainer import SpotlighterAttachedMixin


@TRAINER_REGISTRY.register()
class {name}Spotlighter(SpotlighterAttachedMixin, TRAINER_REGISTRY.get("{name}")):
    pass
'''


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


@dataclass(frozen=True)
class Host:
    """A trainer in a fork: by which of our hosts it is known, under which name and in which module it is registered."""

    known: str | None
    registered: str
    module: str
    imported: bool = True  # by train.py

    @property
    def trainer(self) -> str:
        return f"{self.known or self.registered}{SUFFIX}"

    @property
    def ours(self) -> str:
        """The module of the fork that is to hold our trainer."""
        return f"{self.module.rpartition('.')[0]}.{(self.known or self.registered).lower()}_spotlighter"

    @property
    def files(self) -> dict[str, bytes]:
        """What is written, by path in the fork."""
        path = f"{self.ours.replace('.', '/')}.py"
        if self.known is None:
            return {path: GENERIC.format(name=self.registered, module=self.module).encode()}
        config = f"configs/trainers/{self.trainer}/vit_b16.yaml"
        return {path: _read(f"trainers/{path.rpartition('/')[2]}"), config: _read(config)}

    @property
    def insertions(self) -> list[Insertion]:
        """The hunks of the host's diff; CoOp's, with this trainer's module, for a generic one."""
        found = []
        for line in _read(f"patches/{(self.known or 'CoOp').lower()}.diff").decode().splitlines():
            if hunk := _HUNK.fullmatch(line):
                where, anchor = hunk.groups()
                found.append(Insertion(where, anchor.replace("trainers", self.ours.rpartition(".")[0]), lines=[]))
            elif line.startswith("+") and found:
                found[-1].lines.append(re.sub(r"trainers\.\w+_spotlighter", self.ours, line[1:]))
        return found


# A fork has the trainers of what it was forked from: the youngest comes first.
KNOWN = {"PromptKD": ("PromptKD",), "MaPLe": ("MaPLe",), "CLIPFit": ("ClipFit", "CLIPFit"), "CoOp": ("CoOp",)}


def known_as(registered: str) -> str | None:
    """By which of our hosts a registered trainer is known."""
    return next((name for name, names in KNOWN.items() if registered in names), None)


def hosts_in(folder: Path) -> list[Host]:
    """The trainers of `folder`: those that its train.py imports, first the known ones, youngest first; then the others.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or no train.py that imports a trainer.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if (folder / "spotlighter_plugin").is_dir():
        raise ValueError(f"{folder} is Spotlighter itself, whose trainers are there already: name a fork")
    if not (folder / "train.py").is_file():
        below = next(folder.glob("*/train.py"), None)
        hint = f"did you mean {below.parent}?" if below else "a library's CLIP is wrapped in Python (README.md)"
        raise ValueError(f"{folder} is no fork of CoOp or of its descendants: it has no train.py; {hint}")
    script, found = (folder / "train.py").read_text(errors="replace"), []
    for path in sorted(folder.glob("*/*.py")):
        names = [name for name in _REGISTERED.findall(path.read_text(errors="replace")) if not name.endswith(SUFFIX)]
        imported = bool(names) and _imports(script, path)
        found += [Host(known_as(name), name, f"{path.parent.name}.{path.stem}", imported) for name in names]
    if not any(host.imported for host in found):
        raise ValueError(
            f"{folder} is no fork of CoOp or of its descendants: its train.py imports no trainer that Dassl registers; "
            "wrap the model in Python (docs/your_own_host.md)"
        )
    return sorted(found, key=lambda host: (not host.imported, (*KNOWN, None).index(host.known)))


def _imports(script: str, path: Path) -> bool:
    """Whether a train.py of that text imports a module, by itself or with its whole package."""
    package, name, beside = path.parent.name, rf"\b{path.stem}\b", path.with_name("__init__.py")
    if re.search(rf"^(from|import)\s+{package}\b.*{name}", script, re.M):
        return True
    whole = re.search(rf"^import\s+{package}\s*$", script, re.M) and beside.is_file()
    return bool(whole and re.search(name, beside.read_text(errors="replace")))


def choose(folder: Path, trainer: str | None) -> Host:
    """The host that the fork's trainer of that name is, or the youngest that is known.

    Raises:
        ValueError: there is no such trainer, or nobody said which of several.
    """
    hosts = hosts_in(folder)
    if trainer is not None:
        names, wanted = ", ".join(host.registered for host in hosts), trainer.removesuffix(SUFFIX).lower()
        for host in hosts:
            if wanted in (host.registered.lower(), (host.known or "").lower()):
                return host
        raise ValueError(f"{folder} has no trainer {trainer}: take --trainer with one of {names}")
    names = [host.registered for host in hosts if host.imported]
    if hosts[0].known is None and len(names) > 1:
        raise ValueError(f"{folder} has the trainers {', '.join(names)}: say which with --trainer")
    return hosts[0]


def plan_attach(folder: Path, host: Host) -> dict[Path, bytes | None]:
    """What attaching writes: new contents by path, none where everything is in place.

    Raises:
        ValueError: train.py differs from upstream's or was patched by hand, or a file is in the way.
    """
    changes = {}
    for name, content in host.files.items():
        path = folder / name
        if path.is_file() and path.read_bytes() != content:
            raise ValueError(f"{path} is there already and is not Spotlighter's present one: move it away first")
        if not path.is_file():
            changes[path] = content
    script = folder / "train.py"
    lines, newline = _read_lines(script)
    known = {line for each in hosts_in(folder) for insertion in each.insertions for line in insertion.lines}
    number = next((n for n, line in enumerate(lines, 1) if "spotlighter" in line.lower() and line not in known), None)
    missing = [Insertion(i.where, i.anchor, [x for x in i.lines if x not in lines]) for i in host.insertions]
    missing = [insertion for insertion in missing if insertion.lines]
    if missing and number:
        raise ValueError(
            f"{script}:{number} was patched by hand ({lines[number - 1].strip()}): take what is Spotlighter's "
            f"out, or complete them: {_by_hand(host)}"
        )
    if missing:
        changes[script] = _inserted(script, lines, newline, host, missing)
    return changes


def plan_detach(folder: Path) -> tuple[dict[Path, bytes | None], list[str]]:
    """What detaching writes (None: deletes), and a line about each thing that is left because it was changed."""
    changes, left, ours = {}, [], set()
    for host in hosts_in(folder):
        ours |= {line for insertion in host.insertions for line in insertion.lines}
        for name, content in host.files.items():
            path = folder / name
            if path.is_file() and path.read_bytes() == content:
                changes[path] = None
            elif path.is_file():
                left.append(f"{path}: changed since it was copied")
    script = folder / "train.py"
    lines, newline = _read_lines(script)
    kept = [line for line in lines if line not in ours]
    if kept != lines:
        changes[script] = newline.join(kept).encode("latin-1")
    left += [f"{script}: {line.strip()}" for line in kept if "spotlighter" in line.lower()]
    return changes, left


def _read(path: str) -> bytes:
    """A file of this repository."""
    if not (ROOT / path).is_file():
        raise FileNotFoundError(f"{ROOT / path} is missing: install Spotlighter with pip install -e REPOSITORY")
    return (ROOT / path).read_bytes()


def _read_lines(path: Path) -> tuple[list[str], str]:
    """Lines and newline; latin-1 gives every byte back as it was."""
    text = path.read_bytes().decode("latin-1")
    newline = "\r\n" if "\r\n" in text else "\n"
    return text.split(newline), newline


def _inserted(script: Path, lines: list[str], newline: str, host: Host, insertions: list[Insertion]) -> bytes:
    differs = ValueError(f"{script} differs from upstream's and is left as it is. Add by hand: {_by_hand(host)}")
    places = [(insertion.index(lines), insertion.lines) for insertion in insertions]
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
    lines = "; ".join(f"{i.where} line like `{i.anchor}`: {' | '.join(i.lines)}" for i in host.insertions)
    if host.known is None:
        return f"in train.py, {lines}; or change nothing: spotlighter run -- train.py --trainer {host.trainer} …"
    files = " and ".join(f"copy {ROOT / name} to {name}" for name in host.files)
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
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a checkout of CoOp or of one of its descendants")],
    trainer: Annotated[str | None, typer.Option(help="the fork's trainer; by default the youngest host known")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and do nothing")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="undo it, for all trainers")] = False,
) -> None:
    """Put Spotlighter into a fork: its trainer, its configuration, and a few lines in the fork's train.py."""
    if detach:
        host, (changes, left) = hosts_in(folder)[0], plan_detach(folder)
    else:
        host = choose(folder, trainer)
        changes, left = plan_attach(folder, host), []
    what = f"a fork of {host.known}" if host.known else f"{host.registered} is trained by its own step"
    print(f"{folder}: {what} ({host.module})")
    others = [each.registered for each in hosts_in(folder) if each != host and each.imported]
    if others and trainer is None and not detach:
        print(f"  also there: {', '.join(others)} (--trainer NAME)")
    before = _read_lines(folder / "train.py")[0]
    if not dry_run:
        commit(changes)
    for path, content in changes.items():
        if path.name != "train.py":
            print(f"  {'deleted' if content is None else 'created'} {path.relative_to(folder)}")
            continue
        print(f"  {'removed from' if detach else 'added to'} train.py")
        if detach:
            kept = content.decode("latin-1").splitlines()
            print("\n".join(f"    - {line}" for line in before if line and line not in kept))
            continue
        for insertion in host.insertions:
            place = f"  ({insertion.where} line that matches {insertion.anchor})"
            print("\n".join(f"    + {line}" for line in insertion.lines) + place)
    for line in left:
        print(f"  left as it is: {line}")
    if not changes:
        print("  nothing to do: " + ("not attached" if detach else "attached already"))
    if dry_run:
        print("  (dry run: nothing was changed)")
    elif not detach:
        print(f"run it in {folder}:\n  {_example(host)}")


def _example(host: Host) -> str:
    own = f"configs/trainers/{host.trainer}/vit_b16.yaml"
    config = own if host.known else f"configs/trainers/{host.registered}/…  # its own"
    return (
        f"python train.py --root DATA --trainer {host.trainer} --dataset-config-file configs/datasets/dtd.yaml "
        f"--output-dir output/dtd --config-file {config}"
    )
