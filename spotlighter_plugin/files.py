"""Files: written aside and renamed, one run a folder, pictures read one way."""

import errno
import glob
import os
import pickle
import platform
import re
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".jp2", ".tga"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
LONGEST = (
    1000  # a picture's longer side over the shorter: a strip of 1 x 100,000 resized by its short side fills memory
)
FOREIGN = 3600  # seconds after which what another machine left half written is swept, too
PATIENCE = 10  # seconds in which the last processes of a killed run end
MACHINE = re.sub(r"[^\w-]", "-", platform.node())
HOLDER = "SPOTLIGHTER_LOCKED"  # the folder whose lock a process has from the one that started it
_held = {}  # {folder: its lock's open file}: what this process writes to
writes = True  # of several processes that make one run, one does


# -- written aside, then renamed -------------------------------------------------------------------------------


def write_aside(path, write, option="--output-dir") -> None:
    """Let `write(file)` fill a binary file that is `path` when it is whole, and never was when it fails.

    Of several processes that make one run the first one writes, and the others do nothing here.

    Raises: OSError of the kind that came up, with one line that names the path and the option to change.
    """
    if not writes:
        return
    path = os.fspath(path)
    aside = aside_of(path)
    refuse_deleted(path)
    _sweep(map(Path, glob.glob(f"{glob.escape(path)}.*.tmp")), FOREIGN)
    try:
        try:
            with open(aside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            with suppress(FileNotFoundError):
                os.remove(aside)
    except OSError as error:
        raise type(error)(_cannot_write(path, error.strerror or error, option)) from error
    except RuntimeError as error:  # torch.save says so of a full disk
        if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
            raise
        raise OSError(_cannot_write(path, os.strerror(errno.ENOSPC), option)) from error


def _cannot_write(path, reason, option):
    return f"cannot write {path} ({reason}): make room or set another {option}"


def aside_of(path) -> str:
    """Where this process writes a file before it takes its place."""
    return f"{os.fspath(path)}.{os.getpid()}@{MACHINE}.tmp"


def sweep_leftovers(folder, age=FOREIGN) -> None:
    """Remove what dead processes left half written, as `aside_of` names it, in a folder and those right in it.

    Args: age: seconds; what may be another machine's stays if it is younger. 0 where nobody else writes.
    """
    _sweep([*Path(folder).glob("*.tmp"), *Path(folder).glob("*/*.tmp")], age)


def _sweep(paths, age):
    for path in paths:
        found = re.search(r"\.(\d+)(@[\w-]*)?\.tmp$", path.name)
        with suppress(OSError):
            mine = found and found[2] == f"@{MACHINE}"
            if found and not _runs(int(found[1])) and (mine or time.time() - path.stat().st_mtime >= age):
                path.unlink()


def _runs(pid):
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


# -- one run a folder ------------------------------------------------------------------------------------------


@contextmanager
def alone_in(folder, wait=False) -> Iterator[tuple[int, ...]]:
    """Hold the folder's lock, which ends with the process. Yields the open files that a child must inherit to keep it.

    A child is told so by `lock_of`. Where the system or the disk knows no locks, nothing is held. Of several processes
    that make one run the first one holds it for all.

    Args: wait: until the folder is free; else another holder is an error.
    Raises: BlockingIOError, one line: another process writes there.
    """
    key = os.path.realpath(folder)
    if key in _held or not writes:  # a launcher's, in this very process, or the first process's
        yield ()
        return
    with open(os.path.join(folder, ".lock"), "a+") as lock:
        if os.environ.get(HOLDER) != key:
            _lock(lock, folder, wait)
        _held[key] = lock
        try:
            yield (lock.fileno(),)
            refuse_deleted(os.path.join(key, ".lock"))
        finally:
            _held.pop(key, None)


def lock_of(folder) -> dict[str, str]:
    """What the environment of a child says that inherits the lock of a folder."""
    return {HOLDER: os.path.realpath(folder)}


def _lock(lock, folder, wait):
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            break
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read(20).strip()
            if not holder.isdigit() or _runs(int(holder)) or time.monotonic() > began + PATIENCE:
                raise BlockingIOError(
                    f"{folder} is in use by another run (process {holder or 'unknown'}): "
                    "let that one end or set another --output-dir"
                ) from None
            time.sleep(0.1)
        except OSError:  # a disk without locks
            return
    with suppress(OSError):  # a full disk takes no number
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), str(os.getpid()).encode())


def refuse_deleted(path) -> None:
    """Raise FileNotFoundError if `path` lies in a folder that this process holds and that somebody took away."""
    path = os.path.realpath(path)
    for folder, lock in _held.items():
        if path.startswith(folder + os.sep):
            there = os.path.join(folder, ".lock")
            if not os.path.exists(there) or not os.path.samestat(os.stat(there), os.fstat(lock.fileno())):
                raise FileNotFoundError(f"{folder} was deleted or moved while the run was writing to it: run it again")


# -- read ------------------------------------------------------------------------------------------------------


class Unpickler(pickle._Unpickler):
    """Python's own keeps its memo in a dictionary, and this one makes no bytearrays: few bytes cannot ask for many."""

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}


def regular(path) -> str | Path:
    """`path`, if it is a file. Raises FileNotFoundError, or ValueError for a folder, a pipe or a device."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is no file but a folder, a pipe or a device")
    return path


def is_picture(name) -> bool:
    """Whether a file's name says that it is a picture."""
    return str(name).lower().endswith(PICTURES)


def pictures_below(folder) -> list[Path]:
    """The pictures in a folder and in those below it, sorted by path; hidden ones are left out."""
    found = []
    for home, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(home, name) for name in names if is_picture(name) and not name.startswith(".")]
    return sorted(found)


def read_picture(path) -> "Image":
    """The picture as RGB, fully decoded; 16-bit grey is brought down to 8 bits.

    Raises: OSError, one line that names the path, for whatever cannot be read: missing, damaged, too large, too long.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
            with Image.open(regular(path)) as image:
                if image.format == "EPS":
                    raise ValueError("EPS is a program, not a picture")
                width, height = image.size
                if max(width, height) > LONGEST * min(width, height):
                    raise ValueError(f"{width} x {height} pixels: more than {LONGEST} times as long as wide")
                return _in_8_bits(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever comes up in them
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{path}: no such picture") from None
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{path} is no readable picture ({reason})") from error


def _in_8_bits(image):
    """A grey picture of more than 8 bits in 8; Pillow's own conversion cuts off everything above 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    wide, real, image = image.mode.startswith("I;16"), image.mode == "F", image.convert("F")
    low, high = image.getextrema()
    if not 0 <= low <= high <= 65535:
        raise ValueError(f"grey from {low:g} to {high:g}, must lie in 0 to 1, 0 to 255 or 0 to 65535")
    scale = 1 / 257 if wide or high > 255 else 255 if real and high <= 1 else 1
    return image.point(lambda value: value * scale + 0.5).convert("L")
