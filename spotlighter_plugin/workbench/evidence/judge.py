"""Accuracies in their own halves and in one label space, and intervals that resample classes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..training.experiment import harmonic_mean

DRAWS = 2000
FIGURES = ("base", "new", "hm", "one_space_base", "one_space_new", "one_space_hm")


@dataclass(frozen=True)
class Answers:
    """What a method made of a data set's test pictures, picture by picture.

    Attributes:
        own: (n,) bool, right among the classes of the picture's own half.
        one: (n,) bool, right among all classes.
    """

    own: NDArray
    one: NDArray


@dataclass(frozen=True)
class Exam:
    """The test pictures of a data set: classes (n,), of which those below ``known`` are base."""

    labels: NDArray
    known: int

    @property
    def halves(self) -> tuple[NDArray, NDArray]:
        return self.labels < self.known, self.labels >= self.known


def answers_of(logits: Tensor, labels: Tensor, known: int) -> Answers:
    """From logits over all classes (n, C): own halves are the same logits' columns."""
    labels, logits = labels.to(logits.device), logits.clone()
    one = logits.argmax(1) == labels
    is_base = labels < known
    columns = (labels.new_ones(logits.shape[1]).cumsum(0) <= known)[None]  # (1, C), the base ones
    own = logits.masked_fill(columns != is_base[:, None], -float("inf")).argmax(1) == labels
    return Answers(own.cpu().numpy(), one.cpu().numpy())


def figures(answers: Answers, exam: Exam) -> dict[str, float]:
    """The six ``FIGURES``, in percent."""
    base, new = exam.halves
    rates = [100 * float(right[half].mean()) for right in (answers.own, answers.one) for half in (base, new)]
    return dict(zip(FIGURES, _with_means(*rates), strict=True))


def resampled(cells: list[Answers], exams: list[Exam], draws: int = DRAWS, seed: int = 0) -> dict[str, NDArray]:
    """What chance could have made of ``figures``: {figure: (draws, cells)}.

    Each draw takes classes with replacement, base and new apart, and of a class, each time it is taken, as many of its
    scenes with replacement. All cells see the same classes in a draw, and cells of one exam the same scenes.

    Args:
        cells: answers of one method or many, for any exams of one set of classes.
        exams: the exam of each cell.

    Raises:
        ValueError: exams of different classes.
    """
    shapes = {(exam.known, int(exam.labels.max())) for exam in exams}
    if len(shapes) > 1:
        raise ValueError(f"exams have different classes (base, last): {sorted(shapes)}; judge them one by one")
    rng = np.random.default_rng(seed)
    known, last = shapes.pop()
    taken = [rng.multinomial(n, np.full(n, 1 / n), size=draws) for n in (known, last + 1 - known)]
    taken = np.concatenate(taken, 1)  # (draws, C), how often
    weights = {}
    rates = np.empty((4, draws, len(cells)))
    for i, (answers, exam) in enumerate(zip(cells, exams, strict=True)):
        if id(exam) not in weights:
            weights[id(exam)] = _scene_counts(exam, taken, rng)
        for half, (inside, counts) in enumerate(weights[id(exam)]):
            for j, right in enumerate((answers.own, answers.one)):
                rates[2 * j + half, :, i] = 100 * (counts @ right[inside].astype(np.float32)) / counts.sum(1)
    return dict(zip(FIGURES, _with_means(*rates), strict=True))


def interval(first: NDArray, second: NDArray, mean: float) -> tuple[float, float, float]:
    """Mean, low and high (95 %) of a difference of two methods' figures, each resampled alike: (draws,)."""
    low, high = np.percentile(first - second, [2.5, 97.5])
    return mean, float(low), float(high)


def _with_means(base, new, one_base, one_new):
    return base, new, harmonic_mean(base, new), one_base, one_new, harmonic_mean(one_base, one_new)


def _scene_counts(exam: Exam, taken: NDArray, rng) -> list[tuple[NDArray, NDArray]]:
    """How often each scene is in each draw, base and new apart: positions (m,) and counts (draws, m)."""
    halves = []
    for half in exam.halves:
        inside, counts = np.flatnonzero(half), np.zeros((len(taken), int(half.sum())), np.float32)
        for c in np.unique(exam.labels[inside]):
            mine = np.flatnonzero(exam.labels[inside] == c)
            counts[:, mine] = rng.multinomial(taken[:, c] * len(mine), np.full(len(mine), 1 / len(mine)))
        halves.append((inside, counts))
    return halves
