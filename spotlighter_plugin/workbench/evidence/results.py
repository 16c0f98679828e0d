"""One compact file of finished rows: what every test picture was taken for, right or wrong, and what it cost."""

import fcntl
import json
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from ...files import write_aside
from .judge import Answers, Exam


@dataclass(frozen=True, order=True)
class Key:
    """A row's name, the data set that it is judged on and the one that it was trained on, the seed, shots a class."""

    method: str
    dataset: str
    source: str
    seed: int
    shots: int = 16


class Results:
    """Finished rows in the order in which they came.

    Attributes:
        facts: {key: what a row is known by, beside its answers: operations_ratio, trained, memory_mb, chosen, made}.
        answers: {key: Answers}. exams: {data set: Exam}.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.facts, self.answers, self.exams = {}, {}, {}
        if self.path.exists():
            self._read()

    def put(self, rows: dict[Key, tuple[dict, Answers, Exam]]) -> None:
        """Add finished rows; what other processes have added meanwhile stays.

        Raises:
            ValueError: the file's rows of a data set were judged on other pictures.
        """
        with self._locked():
            self.__init__(self.path)
            for key, (facts, answers, exam) in rows.items():
                there = self.exams.get(key.dataset, exam)
                if there.known != exam.known or not np.array_equal(there.labels, exam.labels):
                    self._drop(key.dataset)
                self.facts[key], self.answers[key], self.exams[key.dataset] = facts, answers, exam
            self._write()

    def _drop(self, dataset: str) -> None:
        """Forget what was judged on other pictures than today's."""
        for key in [key for key in self.facts if key.dataset == dataset]:
            del self.facts[key], self.answers[key]

    def _read(self) -> None:
        with np.load(self.path) as data:
            index = json.loads(data["index"].tobytes())
            for name, known in index["exams"].items():
                self.exams[name] = Exam(data[f"labels of {name}"].astype(np.int64), known)
            bits, start = data["answers"], 0
            for row in index["rows"]:
                key = Key(*row["key"])
                n = len(self.exams[key.dataset].labels)
                size = -(-2 * n // 8)
                right = np.unpackbits(bits[start : start + size], count=2 * n).astype(bool)
                self.facts[key], self.answers[key] = row["facts"], Answers(right[:n], right[n:])
                start += size

    def _write(self) -> None:
        rows = [{"key": list(astuple(k)), "facts": facts} for k, facts in self.facts.items()]
        index = {"exams": {name: exam.known for name, exam in self.exams.items()}, "rows": rows}
        packed = [np.packbits(np.concatenate([a.own, a.one])) for a in self.answers.values()]
        labels = {f"labels of {name}": exam.labels.astype(np.uint16) for name, exam in self.exams.items()}
        text = np.frombuffer(json.dumps(index).encode(), np.uint8)
        parts = {"index": text, "answers": np.concatenate(packed), **labels}
        write_aside(self.path, lambda file: np.savez_compressed(file, **parts), "--results")

    @contextmanager
    def _locked(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(f".{self.path.name}.lock")
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
