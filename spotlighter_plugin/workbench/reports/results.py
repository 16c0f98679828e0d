"""Results of many runs, by method, data set, protocol, shots and seed, read from their folders."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ..training.runs import RunLog, read_run, same

# Settings in which runs of one cell may differ.
FREE = (
    "OUTPUT_DIR", "RESUME", "SEED", "USE_CUDA", "VERBOSE", "VERSION", "TRAIN.", "TEST.",
    "DATASET.ROOT", "DATASET.SUBSAMPLE_CLASSES", "DATALOADER.NUM_WORKERS", "DATALOADER.TEST.",
)  # fmt: skip
NAMES = {"ZeroshotCLIP": "CLIP", "ClipFit": "CLIPFit"}


@dataclass(frozen=True)
class Result:
    """One accuracy.

    Attributes:
        method: as the paper names it, e.g. "CoOp w/ Spotlighter".
        dataset: as registered, e.g. "Caltech101".
        kind: "base" or "new" (base-to-new), "few" (trained and tested on all classes), "cross" (trained elsewhere) or
            "zero" (not trained, all classes).
        source: of kind "cross", the data set of the training.
        shots: DATASET.NUM_SHOTS. seed: SEED.
        accuracy: percent, None if the run is incomplete.
        run: where it is from.
    """

    method: str
    dataset: str
    kind: str
    shots: int
    seed: int
    accuracy: float | None
    run: RunLog
    source: str = ""


def method_name(trainer) -> str:
    """The paper's name of a trainer."""
    host = trainer.removesuffix("Spotlighter")
    return NAMES.get(host, host) + (" w/ Spotlighter" if host != trainer else "")


def find_results(paths, config="", warn=lambda line: print(line, file=sys.stderr)) -> list[Result]:
    """The results in folders of runs.

    Args:
        paths: folders; every folder below them with a log.txt is a run.
        config: only runs of this configuration file, e.g. "vit_b16_ep50".
        warn: called with one line for each half-written log.

    Raises: FileNotFoundError (no such folder), ValueError (no run in them; runs of different settings in one cell).
    """
    results = []
    for folder in sorted({folder for path in paths for folder in _folders(path)}):
        run = read_run(folder)
        if config and (Path(run.arguments.get("config_file") or "default").stem != config):
            continue
        if "DATASET.NAME" not in run.settings or "TRAINER.NAME" not in run.settings:
            warn(f"{folder}: the log ends before the settings, left out")
            continue
        if not run.complete:
            warn(f"{folder}: half-written log, it ends in {run.reached}; its cell is marked incomplete")
        results += _results(run)
    if not results:
        raise ValueError(f"no run in {', '.join(map(str, paths))}{f' with --config {config}' if config else ''}")
    trained = {result.run.folder: result.dataset for result in results}
    results = [replace(r, source=_source(r.run, trained)) if r.kind == "cross" else r for r in results]
    _refuse_mixtures(results)
    return results


def _folders(path):
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path}: no such folder of runs")
    for folder, _, files in os.walk(path, followlinks=True):
        if any(name.startswith("log.txt") for name in files):
            yield Path(folder).resolve()


def _source(run, trained):
    """The data set of the run whose model was evaluated: of that run, or by the folder's name if it is not at hand."""
    folder = Path(run.arguments["model_dir"])
    named = "ImageNet" if "imagenet" in folder.parts else ""
    return trained.get(folder.resolve(), named)


def _results(run):
    settings = run.settings
    half = settings.get("DATASET.SUBSAMPLE_CLASSES", "all")
    trainer = settings["TRAINER.NAME"]

    dataset = settings["DATASET.NAME"]
    if half.startswith("inner-"):  # halves of the base classes, to choose options by: never a figure of the data set
        dataset, half = f"{dataset} (validation)", half.removeprefix("inner-")

    def result(kind, split="test"):
        return Result(
            method_name(trainer),
            dataset,
            kind,
            int(settings.get("DATASET.NUM_SHOTS", -1)),
            int(settings.get("SEED", -1)),
            run.accuracy.get(split),
            run,
        )

    if trainer.startswith("PromptKD") and settings.get("TRAINER.MODAL") == "base2novel":
        return [result("base", "val"), result("new")]
    if half != "all":
        return [result(half)] if half in ("base", "new") else []
    if run.evaluates_only:
        return [result("cross" if run.arguments.get("model_dir") else "zero")]
    return [result("few")]


def _refuse_mixtures(results):
    """Runs of one cell must differ in nothing but the seed; a seed must not come twice with different results."""
    first, seen = {}, {}
    for result in results:
        kind = "base2new" if result.kind in ("base", "new") else (result.kind, result.shots, result.source)
        other = first.setdefault((result.method, result.dataset, kind), result)
        for key in sorted(other.run.settings.keys() & result.run.settings.keys()):
            one, two = other.run.settings[key], result.run.settings[key]
            if not key.startswith(FREE) and not same(one, two):
                raise ValueError(
                    f"runs of different settings for {result.method} on {result.dataset}: {key} is {one} in "
                    f"{other.run.folder} and {two} in {result.run.folder}; give fewer folders or --config"
                )
        if result.accuracy is not None:
            cell = result.method, result.dataset, result.kind, result.shots, result.source, result.seed
            other = seen.setdefault(cell, result)
            if abs(other.accuracy - result.accuracy) > 0.05:
                raise ValueError(
                    f"two results for {result.method} on {result.dataset} ({result.kind}, seed {result.seed}): "
                    f"{other.run.folder} and {result.run.folder}; give fewer folders"
                )
