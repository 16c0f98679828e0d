"""The same splits and the same few shots as CoOp's own code draws, where its checkout is at hand.

SPOTLIGHTER_UPSTREAM names a folder with the checkout `CoOp`, and `dassl` if the real Dassl is to be used.
"""

import importlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import pytest
from miniatures import BUILDERS, VARIANTS, config

import spotlighter_plugin  # noqa: F401  (makes dassl importable)

UPSTREAM = pathlib.Path(os.environ.get("SPOTLIGHTER_UPSTREAM", "absent"))
SEEDS = (1, 2, 3)
pytestmark = pytest.mark.skipif(
    not (UPSTREAM / "CoOp/datasets").is_dir(), reason="SPOTLIGHTER_UPSTREAM names no folder with a checkout of CoOp"
)


def clean(root):
    """Forget splits and caches, so that the next reader makes them."""
    for path in [*root.glob("*/split_zhou_*.json"), *root.glob("*/preprocessed.*")]:
        path.unlink()
    forget_shots(root)


def forget_shots(root):
    for path in root.glob("*/split_fewshot"):
        shutil.rmtree(path)


def reading(registry, root, name, shots, seed, subsample):
    """Splits and class names of one data set, each image as [path, label, class name]."""
    random.seed(seed)
    dataset = registry.get(name)(config(root / name, shots, seed, subsample))
    splits = [split or [] for split in (dataset.train_x, dataset.val, dataset.test)]
    return [[[item.impath, item.label, item.classname] for item in split] for split in splits] + [dataset.classnames]


def readings(registry, root):
    """What each data set gives for each seed: a fresh split, then few shots of its base and its new classes."""
    found = {}
    for name in BUILDERS:
        for seed in (1,) if name in VARIANTS else SEEDS:
            clean(root / name)
            found[f"{name} seed {seed} fresh"] = reading(registry, root, name, 2, seed, "all")
            if name not in VARIANTS:
                forget_shots(root / name)
                found[f"{name} seed {seed} base"] = reading(registry, root, name, 4, seed, "base")
                found[f"{name} seed {seed} new"] = reading(registry, root, name, 4, seed, "new")
    return found


def upstream_process(root, result):
    """Runs in a process of its own, as CoOp's package is called `datasets` too."""
    from dassl.data.datasets import DATASET_REGISTRY

    sys.path.insert(0, str(UPSTREAM / "CoOp"))
    modules = "imagenet caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat "
    modules += "ucf101 imagenetv2 imagenet_sketch imagenet_a imagenet_r"
    for module in modules.split():
        assert importlib.import_module(f"datasets.{module}").__file__.startswith(str(UPSTREAM))
    pathlib.Path(result).write_text(json.dumps(readings(DATASET_REGISTRY, pathlib.Path(root))))


@pytest.fixture(scope="module")
def read_by_upstream(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name, build in BUILDERS.items():
        build(root / name)
    result = tmp_path_factory.mktemp("result") / "upstream.json"
    here = pathlib.Path(__file__)
    call = f"import {here.stem} as test; test.upstream_process({str(root)!r}, {str(result)!r})"
    paths = [*map(str, (here.parent, here.parents[1], UPSTREAM / "dassl")), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "-c", call],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=result.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return root, json.loads(result.read_text())


def our_registry():
    from dassl.data.datasets import DATASET_REGISTRY

    import datasets  # noqa: F401

    return DATASET_REGISTRY


def test_the_pickled_shots_that_upstream_left_are_read(read_by_upstream):
    root, theirs = read_by_upstream
    for name in (name for name in BUILDERS if name not in VARIANTS):
        assert list((root / name).glob("*/split_fewshot/shot_4-seed_3.pkl"))
        assert reading(our_registry(), root, name, 4, 3, "new") == theirs[f"{name} seed 3 new"]


def test_each_seed_gives_upstreams_splits_and_few_shots(read_by_upstream):
    root, theirs = read_by_upstream
    ours = json.loads(json.dumps(readings(our_registry(), root)))
    assert len(theirs) == 11 * 3 * 3 + 4
    for key, expected in theirs.items():
        assert ours[key] == expected, key
