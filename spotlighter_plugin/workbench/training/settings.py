"""Flags and configuration: from the command line to one checked, frozen tree."""

import argparse
import difflib
import importlib
import os
import pkgutil
import sys
from pathlib import Path

import yaml
from yacs.config import CfgNode

from ...compat import ROOT
from ...files import regular
from .runs import config_files

DEFAULT_SEED = 1
DEFAULT_BACKBONE = "ViT-B/16"
CLIP_INPUT = {
    "INTERPOLATION": "bicubic",
    "PIXEL_MEAN": [0.48145466, 0.4578275, 0.40821073],
    "PIXEL_STD": [0.26862954, 0.26130258, 0.27577711],
    "TRANSFORMS": ["random_resized_crop", "random_flip", "normalize"],
}
LARGEST_FLOAT = 3.4028234e38  # float32's
RANGES = {  # smallest and largest value
    "SEED": (-(2**31), 2**32 - 1),  # NumPy's generator takes no larger one
    "DATALOADER.TRAIN_X.BATCH_SIZE": (1, 2**31),
    "DATALOADER.TRAIN_U.BATCH_SIZE": (1, 2**31),
    "DATALOADER.TEST.BATCH_SIZE": (1, 2**31),
    "DATALOADER.NUM_WORKERS": (0, 1024),
    "DATALOADER.K_TRANSFORMS": (1, 1024),
    "DATASET.NUM_SHOTS": (-(2**31), 2**31),
    "INPUT.CROP_PADDING": (0, 10_000),
    "INPUT.CUTOUT_N": (0, 10_000),
    "INPUT.CUTOUT_LEN": (0, 10_000),
    "OPTIM.MAX_EPOCH": (1, 10**7),
    "OPTIM.WARMUP_EPOCH": (-(2**31), 10**7),
    "OPTIM.LR": (0, LARGEST_FLOAT),
    "TRAIN.PRINT_FREQ": (1, 2**31),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")


def parse(argv=None) -> argparse.Namespace:
    """The flags as a namespace. Raises ValueError for an unknown or malformed one."""
    p = _Parser(prog="train.py", description="Train and evaluate a prompt-tuning host, with or without Spotlighter.")
    p.add_argument("--trainer", default="", help="e.g. CoOp, CoOpSpotlighter, ZeroshotCLIP")
    p.add_argument("--dataset-config-file", default="", help="configs/datasets/*.yaml")
    p.add_argument("--config-file", default="", help="default: configs/trainers/<trainer>/default.yaml")
    p.add_argument("--root", default="", help="folder of the data sets (default: ./data)")
    p.add_argument("--output-dir", default="", help="default: output/<dataset>/<trainer>[/<classes>]/seed<seed>")
    p.add_argument("--seed", type=int, help=f"negative: not seeded (default: {DEFAULT_SEED})")
    p.add_argument("--resume", default="", metavar="DIR", help="continue the run whose output folder this is")
    p.add_argument("--force", action="store_true", help="go on with a run although settings (not the model's) differ")
    p.add_argument("--backbone", default="", help=f"OpenAI's name, a file, tiny or micro (default: {DEFAULT_BACKBONE})")
    p.add_argument("--head", default="", help="MODEL.HEAD.NAME")
    p.add_argument("--source-domains", nargs="+", help="DATASET.SOURCE_DOMAINS")
    p.add_argument("--target-domains", nargs="+", help="DATASET.TARGET_DOMAINS")
    p.add_argument("--transforms", nargs="+", help="INPUT.TRANSFORMS")
    p.add_argument("--eval-only", action="store_true", help="load --model-dir and evaluate")
    p.add_argument("--model-dir", default="", help="output folder of the run to evaluate")
    p.add_argument("--load-epoch", type=int, help="epoch to evaluate (default: the best on validation)")
    p.add_argument("--no-train", action="store_true", help="build everything and stop")
    p.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="any option of the configuration")
    return p.parse_args(argv)


def import_trainers_and_datasets() -> list:
    """Import every module of trainers/ and datasets/, which register themselves; returns the trainers' modules."""
    if sys.path[0] != str(ROOT):  # before any other package called "datasets"
        sys.path.insert(0, str(ROOT))
    modules = []
    for package in ("datasets", "trainers"):
        for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
            modules.append(importlib.import_module(f"{package}.{found.name}"))
    return modules


def setup_cfg(args, modules=()) -> CfgNode:
    """Defaults, then the data set's file, the trainer's file, the flags, the trailing options; checked and frozen."""
    from dassl.config import get_cfg_default

    from ...config import extend_cfg

    cfg = get_cfg_default()
    cfg.DATASET.SUBSAMPLE_CLASSES = "all"
    cfg.FORCE = args.force
    cfg.MODEL.BACKBONE.NAME = DEFAULT_BACKBONE
    cfg.INPUT.update(CLIP_INPUT)
    extend_cfg(cfg)
    for module in modules:
        if hasattr(module, "extend_cfg"):
            module.extend_cfg(cfg)

    defaults = flat(cfg)
    if args.dataset_config_file:
        _merge_file(cfg, "--dataset-config-file", args.dataset_config_file)
    default = config_files(ROOT, args.trainer).get("default")
    if args.config_file:
        _merge_file(cfg, "--config-file", args.config_file)
    elif default:
        _merge_file(cfg, "--config-file", default)
    _merge_flags(cfg, args)
    _merge_options(cfg, args.opts)
    for key, value in flat(cfg).items():  # yacs takes None for anything
        if value is None and defaults.get(key) is not None:
            raise ValueError(f"{key} is None, must be a value such as {defaults[key]!r}")
    _check(cfg)
    if cfg.OUTPUT_DIR == get_cfg_default().OUTPUT_DIR:
        cfg.OUTPUT_DIR = _default_output(cfg, args.eval_only)
    cfg.freeze()
    return cfg


def _merge_file(cfg, flag, path):
    path = Path(path)
    if not path.is_file() and not path.is_absolute() and (ROOT / path).is_file():
        path = ROOT / path
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else ROOT / "configs"
        there = ", ".join(sorted(p.name for p in folder.glob("*.yaml"))) or "no .yaml file"
        raise FileNotFoundError(f"{flag} {path}: no such file ({folder} has: {there})")
    try:
        cfg.merge_from_other_cfg(read_settings(path))
    except Exception as error:  # yacs raises whatever comes up when values of two kinds meet
        raise ValueError(f"{flag} {path}: {_reason(cfg, error)}") from error


def read_settings(path) -> CfgNode:
    """The configuration in a YAML file. Raises ValueError with one line for anything else; nothing in it is run."""
    if Path(path).suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path} is no .yaml file")
    try:
        content = yaml.safe_load(regular(path).read_bytes().decode("utf-8-sig")) or {}
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not KEY: VALUE lines")
        return CfgNode(content)
    except Exception as error:  # yaml and yacs raise whatever comes up in a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is no configuration ({reason})") from error


def _merge_flags(cfg, args):
    cfg.DATASET.ROOT = args.root or cfg.DATASET.ROOT or "./data"
    cfg.RESUME = args.resume or cfg.RESUME
    cfg.OUTPUT_DIR = args.output_dir or cfg.RESUME or cfg.OUTPUT_DIR
    cfg.SEED = args.seed if args.seed is not None else cfg.SEED if cfg.SEED >= 0 else DEFAULT_SEED
    cfg.DATASET.SOURCE_DOMAINS = args.source_domains or cfg.DATASET.SOURCE_DOMAINS
    cfg.DATASET.TARGET_DOMAINS = args.target_domains or cfg.DATASET.TARGET_DOMAINS
    cfg.INPUT.TRANSFORMS = args.transforms or cfg.INPUT.TRANSFORMS
    cfg.TRAINER.NAME = args.trainer or cfg.TRAINER.NAME
    cfg.MODEL.BACKBONE.NAME = args.backbone or cfg.MODEL.BACKBONE.NAME
    cfg.MODEL.HEAD.NAME = args.head or cfg.MODEL.HEAD.NAME


def _merge_options(cfg, options):
    if len(options) % 2:
        raise ValueError(f"options are KEY VALUE pairs, {options[-1]!r} stands alone")
    for key, value in zip(options[::2], options[1::2], strict=True):
        if key.startswith("-"):
            raise ValueError(f"{key}: flags come before the KEY VALUE options")
        if isinstance(flat(cfg).get(key), float) and value.lstrip("+-").isdigit():
            value = f"{value}."  # yacs tells 1 from 1.0
        try:
            cfg.merge_from_list([key, value])
        except Exception as error:  # yacs raises whatever comes up when values of two kinds meet
            raise ValueError(f"{key} {value}: {_reason(cfg, error, key)}") from error


def _reason(cfg, error, key=None):
    text = " ".join(str(error).strip("'\"").split())
    if "on-existent" not in text:
        return text
    close = difflib.get_close_matches(key or text.split()[-1], flat(cfg), n=1, cutoff=0.4)
    return text + (f"; did you mean {close[0]}?" if close else "")


def flat(node, prefix="") -> dict:
    """{"A.B.C": value} for every leaf."""
    leaves = {}
    for key, value in node.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {f"{prefix}{key}": value}
    return leaves


def _check(cfg):
    """Raise ValueError for an unknown name or a number out of range."""
    from dassl.data.datasets import DATASET_REGISTRY
    from dassl.engine import TRAINER_REGISTRY

    from ...config import from_cfg

    _known("--trainer", cfg.TRAINER.NAME, _here(TRAINER_REGISTRY))
    _known("DATASET.NAME (set by --dataset-config-file)", cfg.DATASET.NAME, _here(DATASET_REGISTRY))
    _known("TEST.SPLIT", cfg.TEST.SPLIT, ["val", "test"])
    _known("TEST.FINAL_MODEL", cfg.TEST.FINAL_MODEL, ["last_step", "best_val"])
    for key, value in flat(cfg).items():
        _number(key, value)
        least, most = RANGES.get(key, (None, None))
        if least is not None and not isinstance(value, (int, float)):
            raise ValueError(f"{key} is {value!r}, must be a number of at least {least}")
        if least is not None and not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most}"
            raise ValueError(f"{key} is {value}, must be {bound}")
    from_cfg(cfg)  # Spotlighter's own options
    size = cfg.INPUT.SIZE
    if len(size) != 2 or not all(type(side) is int and 1 <= side <= 10_000 for side in size):
        raise ValueError(f"INPUT.SIZE is {tuple(size)}, must be (height, width) in pixels, 1 to 10000")
    steps = cfg.OPTIM.STEPSIZE
    if not steps or not all(type(step) is int for step in steps):
        raise ValueError(f"OPTIM.STEPSIZE is {steps}, must be numbers of epochs")
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(cfg.INPUT[key]) != 3 or not all(type(part) in (int, float) for part in cfg.INPUT[key]):
            raise ValueError(f"INPUT.{key} is {cfg.INPUT[key]}, must be three numbers")
    if 0 in cfg.INPUT.PIXEL_STD:
        raise ValueError(f"INPUT.PIXEL_STD is {cfg.INPUT.PIXEL_STD}, must be above 0")
    if not all(isinstance(name, str) for name in cfg.INPUT.TRANSFORMS):
        raise ValueError(f"INPUT.TRANSFORMS is {cfg.INPUT.TRANSFORMS}, must be names")


def _number(key, value):
    """Raise ValueError unless numbers, those in lists too, fit into what PyTorch computes with."""
    for each in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(each, (list, tuple)):
            _number(key, each)
        elif isinstance(each, float) and not abs(each) <= LARGEST_FLOAT:
            raise ValueError(f"{key} is {value}, must be a number below {LARGEST_FLOAT:.1e}")
        elif isinstance(each, int) and not abs(each) < 2**63:
            raise ValueError(f"{key} is {value}, must be below 2^63")


def _here(registry):
    """Registered names, without the real Dassl's own trainers and benchmarks."""
    return [name for name in registry.registered_names() if not registry.get(name).__module__.startswith("dassl.")]


def _known(what, name, known):
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{what} {name!r} is not one of {', '.join(sorted(known))}{hint}")


def _default_output(cfg, eval_only):
    classes = cfg.DATASET.SUBSAMPLE_CLASSES
    part = f"test_{classes}" if eval_only else "" if classes == "all" else classes
    return os.path.join("output", cfg.DATASET.NAME, cfg.TRAINER.NAME, part, f"seed{cfg.SEED}")
