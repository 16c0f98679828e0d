"""What a run's folder says about the run: its settings, its results, and how far it came.

Reads the `log.txt` that Dassl writes, upstream's and ours alike. A continued run adds `log.txt-<time>`; the last
complete one counts.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

NOTE, SETTINGS = "run.json", "config.yaml"  # what a run here writes last, and first
MARKS = re.compile(
    r"Evaluate on the \*(?P<split>\w+)\* set|(?P<finish>^Finish training)|"
    r"^\* total: (?P<total>[\d,]+)\s+\* correct: (?P<correct>[\d,]+)\s+\* accuracy: (?P<accuracy>[\d.]+)%",
    re.MULTILINE,
)
EPOCH = re.compile(r"epoch \[(\d+)/(\d+)\](?:\s*(?:batch )?\[(\d+)/(\d+)\])?")


def config_files(home: Path, trainer: str) -> dict[str, Path]:
    """A trainer's configuration files by name; XSpotlighter has those of X, too, where it has none of that name."""
    owners = [name for name in (trainer.removesuffix("Spotlighter"), trainer) if name]
    folders = (Path(home, "configs/trainers", owner) for owner in owners)
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


@dataclass(frozen=True)
class RunLog:
    """One run as its folder tells it.

    Attributes:
        folder: where it lies.
        arguments: train.py's flags, as printed.
        settings: {"DATASET.NAME": "Caltech101", …}, as printed.
        accuracy: {"test": percent, "val": percent}; empty unless the run is complete. Of several evaluations
            on the validation split in a training, the best counts.
        reached: for people, e.g. "epoch [3/50]".
    """

    folder: Path
    arguments: dict
    settings: dict
    accuracy: dict
    reached: str

    @property
    def complete(self) -> bool:
        return bool(self.accuracy)

    @property
    def evaluates_only(self) -> bool:
        return self.arguments.get("eval_only") == "True"


def log_files(folder) -> list[Path]:
    """The logs of a folder, oldest first."""
    return sorted(path for path in Path(folder).glob("log.txt*") if path.is_file())


def read_run(folder) -> RunLog | None:
    """The RunLog of a folder with logs, None for a folder without."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in log_files(folder)]
    if not texts:
        return None
    runs = [_read_log(Path(folder), text) for text in texts]
    return next((run for run in reversed(runs) if run.complete), runs[-1])


def _read_log(folder, text):
    arguments = _indented(text, "** Arguments **")
    settings = _indented(text, "** Config **")
    training = arguments.get("eval_only") != "True" and not (not arguments and "epoch [" not in text)
    accuracy, split, finished = {}, "test", not training
    for mark in MARKS.finditer(text):
        if mark["split"]:
            split = mark["split"]
        elif mark["finish"]:
            finished = True
        elif split == "val" or finished:
            total, correct = (int(mark[name].replace(",", "")) for name in ("total", "correct"))
            percent = 100 * correct / total if total else float(mark["accuracy"])
            accuracy[split] = max(percent, accuracy.get(split, 0)) if split == "val" and training else percent
    if not finished or (training and "test" not in accuracy and settings.get("TEST.SPLIT") != "val"):
        accuracy = {}
    epochs = EPOCH.findall(text)
    reached = f"epoch [{epochs[-1][0]}/{epochs[-1][1]}]" if epochs else "no epoch"
    return RunLog(folder, arguments, settings, accuracy, "the final evaluation" if finished and training else reached)


def _indented(text, heading):
    """The `KEY: value` lines under a heading as {"A.B": "value"}, nested by their indentation."""
    start = text.find(heading)
    if start < 0:
        return {}
    found, parents = {}, []
    for line in text[start:].splitlines()[2:]:
        match = re.match(r"( *)(\w+):(?: (.*))?$", line)
        if not match:
            break
        depth = len(match[1]) // 2
        parents[depth:] = [match[2]]
        found[".".join(parents)] = match[3] or ""
    return found


def unsaved(folder) -> bool:
    """Whether a run of this repository's train.py has not written all that it keeps, whatever its log says."""
    return Path(folder, SETTINGS).exists() and not Path(folder, NOTE).exists()


def progress(folder) -> float:
    """The part of a run's training that its newest log says is done, 0 to 1."""
    logs = log_files(folder)
    if not logs:
        return 0.0
    with open(logs[-1], "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 4000))
        epochs = EPOCH.findall(file.read().decode(errors="replace"))
    if not epochs:
        return 0.0
    epoch, of, batch, batches = (int(number or 1) for number in epochs[-1])
    return (epoch - 1 + batch / batches) / of


def same(one, other) -> bool:
    """Whether two printed settings are equal: `0.10` and `0.1`, `(1, 2)` and `[1, 2]`."""

    def value(text):
        try:
            found = ast.literal_eval(str(text))
        except (ValueError, SyntaxError):
            return str(text)
        return list(found) if isinstance(found, tuple) else found

    return value(one) == value(other)
