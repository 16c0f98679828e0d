"""What train.py does: flags and configuration in, a trained and evaluated trainer out.

`run(argv)` is for callers in the same process and raises; `main(argv)` is for the command line and turns a user's
mistake into one line on standard error and exit code 1.
"""

import argparse
import difflib
import importlib
import os
import pkgutil
import sys
import tempfile
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from yacs.config import CfgNode

from . import compat
from .runtime.dassl.engine.checkpoints import saved_epochs
from .runtime.dassl.utils import collect_env_info, set_random_seed, setup_logger

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_BACKBONE = "ViT-B/16"
CLIP_INPUT = {
    "INTERPOLATION": "bicubic",
    "PIXEL_MEAN": [0.48145466, 0.4578275, 0.40821073],
    "PIXEL_STD": [0.26862954, 0.26130258, 0.27577711],
    "TRANSFORMS": ["random_resized_crop", "random_flip", "normalize"],
}
DEFAULT_SEED = 1
# Settings that a continued run may change without becoming another run.
FREE_TO_CHANGE = (
    "OUTPUT_DIR", "RESUME", "VERBOSE", "USE_CUDA", "DATASET.ROOT", "DATALOADER.NUM_WORKERS", "DATALOADER.TEST",
    "TRAIN.CHECKPOINT_FREQ", "TRAIN.PRINT_FREQ", "TEST",
)  # fmt: skip


@dataclass
class Run:
    """What `run` returns: the trainer, its configuration and the last evaluation's results in percent."""

    trainer: object
    cfg: CfgNode
    results: dict


def main(argv=None):
    """Run and return the exit code. SPOTLIGHTER_DEBUG=1 shows a mistake's traceback."""
    try:
        run(argv)
    except KeyboardInterrupt:
        print("interrupted; --resume OUTPUT_DIR continues from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        line = one_line(error)
        if line is None or os.environ.get("SPOTLIGHTER_DEBUG"):
            raise
        print(f"error: {line}", file=sys.stderr)
        return 1
    return 0


def run(argv=None):
    """Do what the flags in `argv` (default: the process's own) say. Raises ValueError, OSError … on a mistake."""
    args = _parser().parse_args(argv)
    compat.prepare_dassl()
    modules = import_trainers_and_datasets()
    cfg = setup_cfg(args, modules)
    if not args.eval_only:
        _refuse_other_settings(cfg)
    if cfg.SEED >= 0:
        set_random_seed(cfg.SEED)
    with _log_to(cfg.OUTPUT_DIR):
        _print_header(args, cfg)
        return _train_or_test(args, cfg)


def one_line(error):
    """A user's mistake as one line; None for what looks like a bug, whose traceback is wanted."""
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "loading state_dict" in text:
        mismatch = next((line for line in str(error).splitlines() if "size mismatch" in line), None)
        return f"the checkpoint does not fit the model: {' '.join((mismatch or text).split())}"
    if isinstance(error, RuntimeError) and "out of memory" in text:
        return f"{text[:120]}: lower DATALOADER.TRAIN_X.BATCH_SIZE or DATALOADER.TEST.BATCH_SIZE"
    if isinstance(error, AssertionError) and not text:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{Path(frame.filename).name}:{frame.lineno} requires {frame.line.removeprefix('assert ')}"
    return text if isinstance(error, (ValueError, OSError, FloatingPointError, AssertionError)) else None


# -- flags and configuration -----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")


def _parser():
    p = _Parser(prog="train.py", description="Train and evaluate a prompt-tuning host, with or without Spotlighter.")
    p.add_argument("--trainer", default="", help="e.g. CoOp, CoOpSpotlighter, ZeroshotCLIP")
    p.add_argument("--dataset-config-file", default="", help="configs/datasets/*.yaml")
    p.add_argument("--config-file", default="", help="default: configs/trainers/<trainer>/default.yaml")
    p.add_argument("--root", default="", help="folder of the data sets (default: ./data)")
    p.add_argument("--output-dir", default="", help="default: output/<dataset>/<trainer>/seed<seed>")
    p.add_argument("--seed", type=int, help=f"negative: not seeded (default: {DEFAULT_SEED})")
    p.add_argument("--resume", default="", metavar="DIR", help="continue the run whose output folder this is")
    p.add_argument("--backbone", default="", help=f"OpenAI's name, a file, or tiny (default: {DEFAULT_BACKBONE})")
    p.add_argument("--head", default="", help="MODEL.HEAD.NAME")
    p.add_argument("--source-domains", nargs="+", help="DATASET.SOURCE_DOMAINS")
    p.add_argument("--target-domains", nargs="+", help="DATASET.TARGET_DOMAINS")
    p.add_argument("--transforms", nargs="+", help="INPUT.TRANSFORMS")
    p.add_argument("--eval-only", action="store_true", help="load --model-dir and evaluate")
    p.add_argument("--model-dir", default="", help="output folder of the run to evaluate")
    p.add_argument("--load-epoch", type=int, help="epoch to evaluate (default: the best on validation)")
    p.add_argument("--no-train", action="store_true", help="build everything and stop")
    p.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="any option of the configuration")
    return p


def import_trainers_and_datasets():
    """Import every module of trainers/ and datasets/, which register themselves; returns the trainers' modules."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    modules = []
    for package in ("datasets", "trainers"):
        for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
            modules.append(importlib.import_module(f"{package}.{found.name}"))
    return modules


def setup_cfg(args, modules=()):
    """Defaults, then the data set's file, the trainer's file, the flags, the trailing options; checked and frozen."""
    from dassl.config import get_cfg_default

    from .config import extend_cfg

    cfg = get_cfg_default()
    cfg.DATASET.SUBSAMPLE_CLASSES = "all"
    cfg.MODEL.BACKBONE.NAME = DEFAULT_BACKBONE
    cfg.INPUT.update(CLIP_INPUT)
    extend_cfg(cfg)
    for module in modules:
        if hasattr(module, "extend_cfg"):
            module.extend_cfg(cfg)

    if args.dataset_config_file:
        _merge_file(cfg, "--dataset-config-file", args.dataset_config_file)
    default = ROOT / "configs" / "trainers" / args.trainer / "default.yaml"
    if args.config_file:
        _merge_file(cfg, "--config-file", args.config_file)
    elif args.trainer and default.is_file():
        _merge_file(cfg, "--config-file", default)
    _merge_flags(cfg, args)
    _merge_options(cfg, args.opts)
    _check(cfg)
    cfg.OUTPUT_DIR = args.output_dir or args.resume or _default_output(cfg, args.opts)
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
        cfg.merge_from_file(str(path))
    except (KeyError, ValueError, AssertionError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{flag} {path}: {_reason(cfg, error)}") from error


def _merge_flags(cfg, args):
    cfg.DATASET.ROOT = args.root or cfg.DATASET.ROOT or "./data"
    cfg.RESUME = args.resume or cfg.RESUME
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
        if isinstance(_flat(cfg).get(key), float) and value.lstrip("+-").isdigit():
            value = f"{value}."  # yacs tells 1 from 1.0
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, ValueError, AssertionError, AttributeError) as error:
            raise ValueError(f"{key} {value}: {_reason(cfg, error, key)}") from error


def _reason(cfg, error, key=None):
    text = " ".join(str(error).strip("'\"").split())
    if "on-existent" not in text:
        return text
    close = difflib.get_close_matches(key or text.split()[-1], _flat(cfg), n=1, cutoff=0.4)
    return text + (f"; did you mean {close[0]}?" if close else "")


def _flat(node, prefix=""):
    """{"A.B.C": value} for every leaf."""
    flat = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {f"{prefix}{key}": value}
    return flat


def _check(cfg):
    """Raise ValueError for an unknown name or a number out of range."""
    from dassl.data.datasets import DATASET_REGISTRY
    from dassl.engine import TRAINER_REGISTRY

    _known("--trainer", cfg.TRAINER.NAME, _here(TRAINER_REGISTRY))
    _known("DATASET.NAME (set by --dataset-config-file)", cfg.DATASET.NAME, _here(DATASET_REGISTRY))
    _known("DATASET.SUBSAMPLE_CLASSES", cfg.DATASET.SUBSAMPLE_CLASSES, ["all", "base", "new"])
    _known("TEST.SPLIT", cfg.TEST.SPLIT, ["val", "test"])
    _known("TEST.FINAL_MODEL", cfg.TEST.FINAL_MODEL, ["last_step", "best_val"])
    flat = _flat(cfg)
    smallest = {
        "DATALOADER.TRAIN_X.BATCH_SIZE": 1,
        "DATALOADER.TRAIN_U.BATCH_SIZE": 1,
        "DATALOADER.TEST.BATCH_SIZE": 1,
        "DATALOADER.NUM_WORKERS": 0,
        "DATALOADER.K_TRANSFORMS": 1,
        "OPTIM.MAX_EPOCH": 1,
        "OPTIM.LR": 0,
        "TRAIN.PRINT_FREQ": 1,
    }
    for key, least in smallest.items():
        if flat[key] < least:
            raise ValueError(f"{key} is {flat[key]}, must be at least {least}")


def _here(registry):
    """Registered names, without the real Dassl's own trainers and benchmarks."""
    return [name for name in registry.registered_names() if not registry.get(name).__module__.startswith("dassl.")]


def _known(what, name, known):
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{what} {name!r} is not one of {', '.join(sorted(known))}{hint}")


# -- the output folder -----------------------------------------------------------------------------------------


def _default_output(cfg, options):
    if "OUTPUT_DIR" in options[::2]:
        return cfg.OUTPUT_DIR
    return os.path.join("output", cfg.DATASET.NAME, cfg.TRAINER.NAME, f"seed{cfg.SEED}")


def _refuse_other_settings(cfg):
    """An earlier run in the folder would be continued: raise ValueError if its settings differ. Notes this run's."""
    note = Path(cfg.OUTPUT_DIR, "config.yaml")
    begun = any(saved_epochs(folder) for folder in Path(cfg.OUTPUT_DIR).glob("*/"))
    if begun and note.is_file():
        before, now = (
            {k: v for k, v in _flat(node).items() if not k.startswith(FREE_TO_CHANGE)}
            for node in (CfgNode.load_cfg(note.read_text(encoding="utf-8")), cfg)
        )
        for key in sorted(before.keys() & now.keys()):
            if _plain(before[key]) != _plain(now[key]):
                raise ValueError(
                    f"{cfg.OUTPUT_DIR} holds a run with {key} {before[key]}, this one has {now[key]}: "
                    "choose another --output-dir or delete that folder"
                )
    with _writable(cfg.OUTPUT_DIR):
        aside = note.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(cfg.dump(), encoding="utf-8")
        os.replace(aside, note)


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def _writable(folder):
    """Make the folder and see that a file can be written there."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        yield
    except OSError as error:
        raise PermissionError(f"--output-dir {folder}: cannot write there ({error.strerror})") from error


@contextmanager
def _log_to(folder):
    """Copy what is printed to `folder`/log.txt; gives standard output back afterwards."""
    console = sys.stdout
    with _writable(folder):
        setup_logger(str(folder))
    try:
        yield
    finally:
        sys.stdout.close()  # the log file; Logger leaves the console open
        sys.stdout = console


def _print_header(args, cfg):
    print("***************\n** Arguments **\n***************")
    for name, value in sorted(vars(args).items()):
        print(f"{name}: {value}")
    print(f"************\n** Config **\n************\n{cfg}")
    print(f"** System info **\n{collect_env_info()}\n")


# -- the run ---------------------------------------------------------------------------------------------------


def _train_or_test(args, cfg):
    from dassl.engine import build_trainer

    trainer = build_trainer(cfg)
    results = _remember_results(trainer)
    if args.eval_only:
        trainer.load_model(args.model_dir, epoch=args.load_epoch)
        trainer.test()
    elif not args.no_train and not trainer.get_model_names():
        trainer.test()  # nothing to train: zero-shot CLIP
    elif not args.no_train:
        try:
            trainer.train()
        except FloatingPointError as error:
            raise FloatingPointError(f"{_place(trainer, error)}; {_last_checkpoint(trainer)}") from error
    return Run(trainer, cfg, results)


def _remember_results(trainer):
    """A dictionary that always holds what the trainer's evaluator returned last."""
    results, evaluate = {}, trainer.evaluator.evaluate

    def remembering():
        results.clear()
        results.update(evaluate())
        return dict(results)

    trainer.evaluator.evaluate = remembering
    return results


def _place(trainer, error):
    """The error's text, with epoch and batch if it does not name them itself (the real Dassl's does not)."""
    if "epoch [" in str(error):
        return str(error)
    epoch, batch = f"{trainer.epoch + 1}/{trainer.max_epoch}", f"{trainer.batch_idx + 1}/{trainer.num_batches}"
    return f"{error} (epoch [{epoch}] batch [{batch}])"


def _last_checkpoint(trainer):
    name = trainer.get_model_names()[0]
    epochs = saved_epochs(os.path.join(trainer.output_dir, name))
    return f"the checkpoint of epoch {max(epochs)} is kept in {trainer.output_dir}" if epochs else "no checkpoint yet"
