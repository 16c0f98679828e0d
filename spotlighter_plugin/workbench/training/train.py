"""What train.py does: flags and configuration in, a trained and evaluated trainer out.

`run(argv)` is for callers in the same process and raises; `main(argv)` is for the command line and turns a user's
mistake into one line on standard error and exit code 1.
"""

import os
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from ...errors import one_line
from ...runtime.dassl.engine.checkpoints import saved_epochs
from ...runtime.dassl.utils import collect_env_info, set_random_seed, setup_logger
from .settings import flat, import_trainers_and_datasets, parse, setup_cfg

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


def run(argv=None, build=None):
    """Do what the flags in `argv` (default: the process's own) say. Raises ValueError, OSError … on a mistake.

    build: makes the trainer of a configuration; default: Dassl's.
    """
    args = parse(argv)
    modules = import_trainers_and_datasets()
    cfg = setup_cfg(args, modules)
    if not args.eval_only:
        _refuse_other_settings(cfg)
    if cfg.SEED >= 0:
        set_random_seed(cfg.SEED)
    with _log_to(cfg.OUTPUT_DIR):
        _print_header(args, cfg)
        return _train_or_test(args, cfg, build)


# -- the output folder -----------------------------------------------------------------------------------------


def _refuse_other_settings(cfg):
    """An earlier run in the folder would be continued: raise ValueError if its settings differ. Notes this run's."""
    note = Path(cfg.OUTPUT_DIR, "config.yaml")
    begun = any(saved_epochs(folder) for folder in Path(cfg.OUTPUT_DIR).glob("*/"))
    if begun and note.is_file():
        before, now = (
            {k: v for k, v in flat(node).items() if not k.startswith(FREE_TO_CHANGE)}
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
    log = sys.stdout
    try:
        yield
    finally:
        log.close()  # the file; the console stays open
        sys.stdout = console


def _print_header(args, cfg):
    print("***************\n** Arguments **\n***************")
    for name, value in sorted(vars(args).items()):
        print(f"{name}: {value}")
    print(f"************\n** Config **\n************\n{cfg}")
    print(f"** System info **\n{collect_env_info()}\n")


# -- the run ---------------------------------------------------------------------------------------------------


def _train_or_test(args, cfg, build):
    from dassl.engine import build_trainer

    trainer = (build or build_trainer)(cfg)
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


if __name__ == "__main__":
    sys.exit(main())
