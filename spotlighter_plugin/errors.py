"""A user's mistake as one line."""

import traceback
from pathlib import Path


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
