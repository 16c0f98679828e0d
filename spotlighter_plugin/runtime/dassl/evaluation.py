"""Counts and prints how well the predictions fit."""

import os
from collections import OrderedDict

import numpy as np
import torch

from spotlighter_plugin import ranks
from spotlighter_plugin.files import write_aside

from .utils import Registry, check_availability

EVALUATOR_REGISTRY = Registry("EVALUATOR")


def build_evaluator(cfg, **kwargs) -> "EvaluatorBase":
    """The evaluator TEST.EVALUATOR."""
    check_availability(cfg.TEST.EVALUATOR, EVALUATOR_REGISTRY.registered_names())
    if cfg.VERBOSE:
        print(f"Loading evaluator: {cfg.TEST.EVALUATOR}")
    return EVALUATOR_REGISTRY.get(cfg.TEST.EVALUATOR)(cfg, **kwargs)


class EvaluatorBase:
    """reset(), then process(output, labels) a batch, then evaluate() -> an ordered dictionary of results."""

    def __init__(self, cfg):
        self.cfg = cfg

    def reset(self) -> None:
        raise NotImplementedError

    def process(self, mo, gt) -> None:
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        raise NotImplementedError


@EVALUATOR_REGISTRY.register()
class Classification(EvaluatorBase):
    """Accuracy, error and macro F1 in percent; per class with TEST.PER_CLASS_RESULT; confusion with COMPUTE_CMAT."""

    def __init__(self, cfg, lab2cname=None, **kwargs):
        super().__init__(cfg)
        self._lab2cname = lab2cname or {}
        self.reset()

    def reset(self) -> None:
        self._y_true, self._y_pred = [], []

    def process(self, mo, gt) -> None:
        """mo: logits (B, C); gt: labels (B,). Raises FloatingPointError for logits that name no class."""
        require_numbers(mo, "the evaluation")
        self._y_true.append(gt.cpu().numpy())
        self._y_pred.append(mo.argmax(dim=1).cpu().numpy())

    def evaluate(self) -> dict[str, float]:
        """Print the result block and return {accuracy, error_rate, macro_f1[, perclass_accuracy]}, of all processes'
        images."""
        found = ranks.gather_objects((self._y_true, self._y_pred))
        true, pred = ([batch for part in parts for batch in part] for parts in zip(*found, strict=True))
        if not true:
            raise ValueError("nothing to evaluate: the test set is empty")
        true, pred = np.concatenate(true).astype(int), np.concatenate(pred).astype(int)
        correct = int((true == pred).sum())
        accuracy = 100.0 * correct / true.size
        results = OrderedDict(accuracy=accuracy, error_rate=100.0 - accuracy, macro_f1=100.0 * macro_f1(true, pred))
        print(
            "=> result\n"
            f"* total: {true.size:,}\n"
            f"* correct: {correct:,}\n"
            f"* accuracy: {results['accuracy']:.1f}%\n"
            f"* error: {results['error_rate']:.1f}%\n"
            f"* macro_f1: {results['macro_f1']:.1f}%"
        )
        if self.cfg.TEST.PER_CLASS_RESULT:
            results["perclass_accuracy"] = self._per_class(true, pred)
        if self.cfg.TEST.COMPUTE_CMAT:
            path = os.path.join(self.cfg.OUTPUT_DIR, "cmat.pt")
            write_aside(path, lambda file: torch.save(torch.from_numpy(confusion(true, pred)), file))
            print(f"Confusion matrix is saved to {path}")
        return results

    def _per_class(self, true, pred):
        print("=> per-class result")
        accuracies = []
        for label in np.unique(true):
            hits = pred[true == label] == label
            accuracies.append(100.0 * float(hits.mean()))
            print(
                f"* class: {label} ({self._lab2cname.get(int(label), label)})\ttotal: {hits.size:,}\t"
                f"correct: {hits.sum():,}\tacc: {accuracies[-1]:.1f}%"
            )
        mean = float(np.mean(accuracies))
        print(f"* average: {mean:.1f}%")
        return mean


def require_numbers(logits, what) -> None:
    """Raise FloatingPointError, one line, unless every row of (B, C) has a largest value; -inf rules a class out."""
    if not torch.isfinite(logits.amax(dim=1)).all():
        raise FloatingPointError(f"the model's logits hold nan or inf: {what} ends without a result")


def macro_f1(true, pred) -> float:
    """Mean over the classes that occur of 2 TP / (true + predicted)."""
    size = max(true.max(), pred.max()) + 1
    hits, n_true, n_pred = (np.bincount(x, minlength=size) for x in (true[true == pred], true, pred))
    present = n_true > 0
    return float((2 * hits[present] / (n_true + n_pred)[present]).mean())


def confusion(true, pred) -> np.ndarray:
    """Row: true class, column: predicted class, over the classes that occur; each row sums to 1 (or 0)."""
    labels, codes = np.unique(np.concatenate([true, pred]), return_inverse=True)
    rows, columns = np.split(codes, 2)
    counts = np.zeros((labels.size, labels.size))
    np.add.at(counts, (rows, columns), 1)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
