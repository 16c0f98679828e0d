"""Runs the rows that are missing, data set by data set and seed by seed."""

from dataclasses import dataclass, field
from pathlib import Path

from ..progress import Steps
from .cell import Cell
from .hosts import Kind
from .judge import Exam
from .results import Key, Results
from .rows import Row
from .tasks import FrozenTower, Task, configuration, load_task


@dataclass
class Laboratory:
    """What runs share: towers, and where features and tunings are kept.

    Args:
        root: folder of the data sets. folder: of what saves time in another run.
        again: run rows although their results are there. every: judge each ``every``-th test picture. shots: a class.
    """

    kind: Kind
    results: Results
    root: str
    folder: Path
    again: bool = False
    every: int = 1
    shots: int = 16
    _towers: dict = field(default_factory=dict)
    _tasks: dict = field(default_factory=dict)

    def run(self, rows: list[Row], datasets: list[str], seeds: list[int], source: str | None, own: bool = True) -> None:
        """Make every row that the results do not hold as it is made today.

        source: what is trained there is judged on the other data sets, too; None: nowhere.
        own: every data set is trained on, not the first alone.
        """
        wanted = [
            (dataset, seed, row, [dataset, *(other for other in datasets if dataset == source != other)])
            for dataset in (datasets if own else datasets[:1]) for seed in seeds for row in rows
        ]  # fmt: skip
        missing = lambda dataset, seed, row, target: self.again or not self._is_there(row, target, dataset, seed)  # noqa: E731
        todo = [(d, s, row, [t for t in targets if missing(d, s, row, t)]) for d, s, row, targets in wanted]
        todo, cells = [each for each in todo if each[-1]], {}
        with Steps(len(todo)) as steps:
            for dataset, seed, row, targets in todo:
                steps.say(f"{Path(dataset).stem} seed {seed}: {row.name}")
                for done in {d for d, _ in cells} - {dataset}:
                    self.tower(done).forget()
                    cells = {}
                for each in (seeds[0], seed):
                    first = cells.get((dataset, seeds[0]))
                    cells[dataset, each] = cells.get((dataset, each)) or self._cell(dataset, each, first)
                self._make(row, cells[dataset, seed], targets)
                steps.advance()

    def tower(self, dataset: str) -> FrozenTower:
        if dataset not in self._towers:
            self._towers[dataset] = FrozenTower(
                configuration(dataset, 1, self.root, options=self.kind.backbone), self.folder
            )
        return self._towers[dataset]

    def _cell(self, dataset: str, seed: int, first: Cell | None) -> Cell:
        task, tower = self.task(dataset, seed), self.tower(dataset)
        return Cell(self.kind, dataset, seed, self.root, task, tower, self.folder, first, self.shots)

    def task(self, dataset: str, seed: int) -> Task:
        if (dataset, seed) not in self._tasks:
            self._tasks[dataset, seed] = load_task(
                configuration(dataset, seed, self.root, options={"DATASET.NUM_SHOTS": self.shots}), self.every
            )
        return self._tasks[dataset, seed]

    def _is_there(self, row: Row, dataset: str, source: str, seed: int) -> bool:
        facts = self.results.facts.get(self._key(row, dataset, source, seed))
        return facts is not None and facts["made"] == self._made(row, source)

    def _made(self, row: Row, source: str) -> str:
        return f"{self.tower(source).fingerprint} {self.kind.options} {row.settings}"

    def _key(self, row: Row, dataset: str, source: str, seed: int) -> Key:
        return Key(row.name, self.tower(dataset).dataset, self.tower(source).dataset, seed, self.shots)

    def _make(self, row: Row, cell: Cell, targets: list[str]) -> None:
        made = row.make(cell)
        facts = {
            "operations_ratio": round(made.share, 4), "trained": made.trained, "memory_mb": round(made.megabytes, 4),
            "chosen": made.chosen, "made": self._made(row, cell.dataset),
        }  # fmt: skip
        finished = {}
        for target in targets:
            task = self.task(target, cell.seed)
            if task.names != cell.task.names:
                raise ValueError(f"{target} has other classes than {cell.dataset}: give --no-cross")
            exam = Exam(task.test.labels.numpy(), task.known)
            answers = made.fitted.answers(task.test, self.tower(target))
            finished[self._key(row, target, cell.dataset, cell.seed)] = facts, answers, exam
        self.results.put(finished)
