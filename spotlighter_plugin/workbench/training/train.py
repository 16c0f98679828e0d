"""What train.py does: flags and configuration in, a trained and evaluated trainer out.

`run(argv)` is for callers in the same process and raises; `main(argv)` is for the command line and turns a user's
mistake into one line on standard error and exit code 1.
"""

import io
import os
import sys
import tempfile
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from ... import ranks
from ...errors import one_line, tell
from ...files import alone_in, sweep_leftovers, write_aside
from ...runtime.dassl.engine.checkpoints import chooses_on_test, refuse_other_settings, saved_epochs, settings_of
from ...runtime.dassl.utils import collect_env_info, set_random_seed, setup_logger
from .saved import save_run
from .settings import import_trainers_and_datasets, parse, read_settings, setup_cfg


@dataclass
class Run:
    """What `run` returns: the trainer, its configuration and the last evaluation's results in percent."""

    trainer: object
    cfg: CfgNode
    results: dict


def main(argv=None) -> int:
    """Run and return the exit code. SPOTLIGHTER_DEBUG=1 shows a mistake's traceback."""
    try:
        run(argv)
    except KeyboardInterrupt as stop:
        tell(f"interrupted; --resume {stop or 'OUTPUT_DIR'} goes on")
        return 130
    except Exception as error:
        line = one_line(error)
        if line is None or os.environ.get("SPOTLIGHTER_DEBUG"):
            raise
        tell(f"error: {line}")
        return 1
    return 0


def run(argv=None, build=None) -> Run:
    """Do what the flags in `argv` (default: the process's own) say. Raises ValueError, OSError … on a mistake.

    build: makes the trainer of a configuration; default: Dassl's.
    """
    args = parse(argv)
    modules = import_trainers_and_datasets()
    cfg = setup_cfg(args, modules)
    if cfg.RESUME and not os.path.isdir(cfg.RESUME):
        raise FileNotFoundError(f"--resume {cfg.RESUME}: no such folder")
    with ranks.joined(), _writable(cfg.OUTPUT_DIR), alone_in(cfg.OUTPUT_DIR):
        ranks.take_device(cfg.USE_CUDA)
        if ranks.is_first():
            sweep_leftovers(cfg.OUTPUT_DIR, age=0)
            if not args.eval_only:
                _refuse_other_settings(cfg)
        ranks.barrier()
        if cfg.SEED >= 0:
            set_random_seed(cfg.SEED)
        with _log_to(cfg.OUTPUT_DIR) as log:
            _print_header(args, cfg, log)
            try:
                return _train_or_test(args, cfg, build)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(cfg.OUTPUT_DIR) from None


# -- the output folder -----------------------------------------------------------------------------------------


def _refuse_other_settings(cfg):
    """Raise ValueError if an earlier run that would be gone on with has other settings. Notes this run's."""
    before = Path(cfg.RESUME or cfg.OUTPUT_DIR)
    if any(saved_epochs(folder) for folder in before.glob("*/")) and (before / "config.yaml").is_file():
        settings = settings_of(read_settings(before / "config.yaml"))
        with redirect_stdout(io.StringIO()):  # the checkpoint's own settings are compared, and told, when it is loaded
            refuse_other_settings(before, settings, settings_of(cfg), cfg.FORCE)
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    write_aside(Path(cfg.OUTPUT_DIR, "config.yaml"), lambda file: file.write(cfg.dump().encode()))


@contextmanager
def _writable(folder):
    """Make the folder and see that a file can be written there."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(f"--output-dir {folder}: cannot write there ({error.strerror})") from error
    yield


@contextmanager
def _log_to(folder):
    """Copy what is printed to `folder`/log.txt, and yield it; gives standard output back afterwards.

    Of several processes the first one prints, and the others' log is None.
    """
    if not ranks.is_first():
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield None
        return
    console = sys.stdout
    setup_logger(os.path.join(folder, "log.txt"))
    log = sys.stdout
    try:
        yield log
    finally:
        sys.stdout = console
        log.close()  # the file; the console stays open


def _print_header(args, cfg, log):
    """Arguments, configuration and machine to the log; what matters of them on the screen."""
    if log is None:
        return
    flags = "".join(f"{name}: {value}\n" for name, value in sorted(vars(args).items()))
    log.note(f"***************\n** Arguments **\n***************\n{flags}")
    log.note(f"************\n** Config **\n************\n{cfg}\n** System info **\n{collect_env_info()}\n\n")
    shots, classes = cfg.DATASET.NUM_SHOTS, cfg.DATASET.SUBSAMPLE_CLASSES
    lines = {
        "Trainer": cfg.TRAINER.NAME,
        "Data": f"{cfg.DATASET.NAME}, {classes} classes, {shots if shots > 0 else 'all'} images a class",
        "Backbone": cfg.MODEL.BACKBONE.NAME,
        "Training": f"{cfg.OPTIM.MAX_EPOCH} epochs, {cfg.OPTIM.NAME}, learning rate {cfg.OPTIM.LR:g}, seed {cfg.SEED}",
        "Folder": f"{cfg.OUTPUT_DIR} (all settings: config.yaml, log.txt)",
    }
    sys.stdout.console.write("".join(f"{name + ':':<10}{value}\n" for name, value in lines.items()))


# -- the run ---------------------------------------------------------------------------------------------------


def _train_or_test(args, cfg, build):
    from dassl.engine import build_trainer

    with ranks.first_alone():
        trainer = (build or build_trainer)(cfg)
    ranks.unite(trainer)
    results = _remember_results(trainer)
    if not args.eval_only and chooses_on_test(trainer):
        raise ValueError(
            f"TEST.FINAL_MODEL best_val: {cfg.DATASET.NAME} has no validation images that are no test images, "
            "so the best epoch would be chosen on what it is tested on; set TEST.FINAL_MODEL last_step"
        )
    if args.eval_only:
        if trainer.get_model_names() and not args.model_dir:
            raise ValueError(f"--eval-only of {cfg.TRAINER.NAME} needs --model-dir, the output folder of its training")
        trainer.load_model(args.model_dir, epoch=args.load_epoch)
        trainer.test()
    elif not args.no_train and not trainer.get_model_names():
        trainer.test()  # nothing to train: zero-shot CLIP
    elif not args.no_train:
        try:
            trainer.train()
        except FloatingPointError as error:
            raise FloatingPointError(f"{_place(trainer, error)}; {_last_checkpoint(trainer)}") from error
    if not args.eval_only and not args.no_train and ranks.is_first():
        save_run(trainer, cfg, results)
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
