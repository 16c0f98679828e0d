"""A user's mistake as one line, once."""

import os
import sys
import traceback
from pathlib import Path

speaks: bool | None = None  # of several processes one does; None: not settled yet


def started_together() -> bool:
    """Whether torchrun, or what sets the same variables, started this process and others."""
    known = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return known and int(os.environ["WORLD_SIZE"]) > 1


def tell(line: str) -> None:
    """Print a line to standard error; of several processes one does."""
    if speaks or (speaks is None and not (started_together() and os.environ["RANK"] != "0")):
        print(line, file=sys.stderr, flush=True)


def one_line(error: Exception) -> str | None:
    """A user's mistake as one line; None for what looks like a bug, whose traceback is wanted."""
    if isinstance(error, MemoryError):
        return "not enough memory: lower DATALOADER.TRAIN_X.BATCH_SIZE or DATALOADER.TEST.BATCH_SIZE"
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "loading state_dict" in text:
        mismatch = next((line for line in str(error).splitlines() if "size mismatch" in line), None)
        return f"the checkpoint does not fit the model: {' '.join((mismatch or text).split())}"
    if isinstance(error, RuntimeError) and "out of memory" in text:
        return f"{text[:120]}: lower DATALOADER.TRAIN_X.BATCH_SIZE or DATALOADER.TEST.BATCH_SIZE"
    if isinstance(error, AssertionError) and not text:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{Path(frame.filename).name}:{frame.lineno} requires {frame.line.removeprefix('assert ')}"
    kinds = (ValueError, OSError, FloatingPointError, AssertionError, ImportError)
    return text if isinstance(error, kinds) else None
