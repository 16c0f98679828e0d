"""Saving, loading, and continuing a run so that the continued one equals the uninterrupted one.

These are functions over any trainer with Dassl's tables `_models`, `_optims`, `_scheds`; TrainerBase takes them as
methods, and compat.py gives them to the real Dassl's trainers too. Every epoch leaves a checkpoint, and the newest two
are kept. The generators of random numbers, the best result so far, the settings and the class names travel in each
under "training_state".
"""

import os
import random
import re
import warnings

import numpy as np
import torch

from spotlighter_plugin import ranks

from ..utils import load_checkpoint, save_checkpoint
from ..utils.checkpoint import load_progress, load_weights, require_finite

# Settings that a continued run may change without becoming another run …
FREE_TO_CHANGE = (
    "OUTPUT_DIR", "RESUME", "FORCE", "VERBOSE", "USE_CUDA", "DATASET.ROOT", "DATALOADER.NUM_WORKERS", "DATALOADER.TEST",
    "TRAIN.CHECKPOINT_FREQ", "TRAIN.PRINT_FREQ", "TEST",
)  # fmt: skip
# … and those that make another model, --force or not.
NEVER_TO_CHANGE = ("MODEL.BACKBONE.NAME", "DATASET.NAME", "DATASET.SUBSAMPLE_CLASSES", "TRAINER.NAME")


def after_epoch(self) -> None:
    """Choose the best epoch on the validation split, if asked to, and save what the run can go on from."""
    test = self.cfg.TEST
    if test.FINAL_MODEL == "best_val" and not test.NO_TEST:
        result = self.test(split="val")
        if result > self.best_result:
            self.best_result = result
            self.save_model(self.epoch, self.output_dir, val_result=result, model_name="model-best.pth.tar")
    done, every = self.epoch + 1, self.cfg.TRAIN.CHECKPOINT_FREQ
    if done == self.max_epoch or (every > 0 and done % every == 0):
        self.save_model(self.epoch, self.output_dir)
    else:
        save_model(self, self.epoch, self.output_dir)  # without what trainers add at the end of training
    _prune(self, self.output_dir, done, every)


def save_model(self, epoch, directory, is_best=False, val_result=None, model_name="") -> None:
    """Save each registered model to `directory`/<name>/model.pth.tar-<epoch + 1> (or `model_name`).

    Raises: FloatingPointError (something is not finite: nothing is written), OSError; one line.
    """
    names, scaler = self.get_model_names(), getattr(self, "scaler", None)
    for name in names:
        require_finite(self._models[name].state_dict(), f"epoch {epoch + 1} is not saved")
    state = {
        "rng": _rng_state(),
        "best_result": float(getattr(self, "best_result", -np.inf)),
        "scaler": scaler.state_dict() if isinstance(scaler, torch.amp.GradScaler) else None,
        "settings": settings_of(self.cfg) if getattr(self, "cfg", None) is not None else None,
        "class_names": _class_names(self),
    }
    for name in names:
        optim, sched = self._optims[name], self._scheds[name]
        save_checkpoint(
            {
                "state_dict": self._models[name].state_dict(),
                "epoch": epoch + 1,
                "optimizer": optim.state_dict() if optim is not None else None,
                "scheduler": sched.state_dict() if sched is not None else None,
                "val_result": None if val_result is None else float(val_result),
                "training_state": state,
            },
            os.path.join(directory, name),
            is_best=is_best,
            model_name=model_name,
        )
    ranks.barrier()  # the first process has written, and all may read


def _prune(self, directory, done, every):
    """Keep of the epochs before this one the newest, and each `every`-th if that is above 0."""
    if not ranks.is_first():
        return
    for name in self.get_model_names():
        older = sorted(n for n in saved_epochs(os.path.join(directory, name)) if n < done)
        for number in older[:-1]:
            if every < 1 or number % every:
                os.remove(os.path.join(directory, name, f"model.pth.tar-{number}"))


def load_model(self, directory, epoch=None) -> None:
    """Load each registered model from `directory`: of that epoch, or the best one. No directory: do nothing."""
    if not directory:
        print("Note: load_model() is skipped, no folder is given (--model-dir)")
        return
    file = "model-best.pth.tar" if epoch is None else f"model.pth.tar-{epoch}"
    for name in self.get_model_names():
        path = os.path.join(directory, name, file)
        if not os.path.exists(path):
            there = sorted(saved_epochs(os.path.dirname(path)))
            raise FileNotFoundError(f"no model at {path}; epochs to give as --load-epoch: {there or 'none'}")
        checkpoint = load_checkpoint(path)
        load_weights(self._models[name], checkpoint["state_dict"], path, whole=True)
        print(f"Load {path} to {name} (epoch={checkpoint['epoch']}, val_result={checkpoint.get('val_result')})")


def resume_model_if_exist(self, directory) -> int:
    """Load the last epoch that every registered model has whole in `directory`; returns it, 0 where there is none.

    Damaged checkpoints are named and left out.

    Raises: FileNotFoundError (--resume names no folder), ValueError (a run of other settings, classes or backbone).
    """
    cfg, names = getattr(self, "cfg", None), self.get_model_names()
    asked = cfg is not None and cfg.RESUME == directory != ""
    if asked and not os.path.isdir(directory):
        raise FileNotFoundError(f"--resume {directory}: no such folder")
    if chooses_on_test(self):
        print("Note: TEST.FINAL_MODEL best_val chooses the epoch on test images: there is no validation split")
    epochs = set.intersection(*(saved_epochs(os.path.join(directory, name)) for name in names)) if names else set()
    for epoch in sorted(epochs, reverse=True):
        paths = {name: os.path.join(directory, name, f"model.pth.tar-{epoch}") for name in names}
        try:
            found = {name: load_checkpoint(path) for name, path in paths.items()}
        except (ValueError, FloatingPointError) as error:
            print(f"Left out: {error}")
            continue
        print(f"Found checkpoint at {directory} (will resume training)")
        _go_on(self, epoch, found, paths)
        return epoch
    if asked or epochs:
        print(f"No whole checkpoint of {', '.join(names)} in {directory}: the run starts over")
    else:
        print("No checkpoint found, train from scratch")
    return 0


def _go_on(self, epoch, found, paths):
    names, state = list(found), next(iter(found.values())).get("training_state") or {}
    path, changed = paths[names[0]], ()
    if getattr(self, "cfg", None) is not None and isinstance(state.get("settings"), dict):
        changed = refuse_other_settings(path, state["settings"], settings_of(self.cfg), self.cfg.get("FORCE", False))
    theirs, ours = state.get("class_names"), _class_names(self)
    if theirs and ours and theirs != ours:
        one, other = next(pair for pair in zip([*theirs, None], [*ours, None], strict=False) if pair[0] != pair[1])
        raise ValueError(f"{path} is of a run on other classes: {one!r} where this one has {other!r}")
    for name in names:
        optim, sched = self._optims[name], self._scheds[name]
        load_weights(self._models[name], found[name]["state_dict"], paths[name], whole=True)
        if any(key.startswith("OPTIM.") for key in changed):
            _take_new_rates(found[name], paths[name], optim, sched, epoch)
        else:
            load_progress(found[name], paths[name], optim, sched)
        print(f"Resumed from {paths[name]} (epoch {epoch})")
    load_progress(state, path, None, None, getattr(self, "scaler", None))
    if "rng" not in state:
        print("The checkpoint holds no random-number state: the rest of the run will draw differently")
        return
    try:
        self.best_result = float(state["best_result"])
        _set_rng_state(state["rng"])
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no state of random numbers that fits ({error})") from None


def _take_new_rates(checkpoint, path, optim, sched, epoch):
    """Momenta as they were, rates and schedule as this run's settings say for that epoch."""
    if optim is None:
        return
    fresh = [{key: value for key, value in group.items() if key != "params"} for group in optim.param_groups]
    load_progress(checkpoint, path, optim)
    for group, values in zip(optim.param_groups, fresh, strict=True):
        group.update(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's remark that no optimizer has stepped yet
        for _ in range(epoch if sched is not None else 0):
            sched.step()


# -- which run it is -------------------------------------------------------------------------------------------


def settings_of(cfg, prefix="") -> dict:
    """{"A.B.C": the value as text} of what makes a run the run that it is."""
    found = {}
    for key, value in cfg.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= settings_of(value, f"{name}.")
        elif not name.startswith(FREE_TO_CHANGE):
            found[name] = str(list(value) if isinstance(value, tuple) else value)
    return found


def refuse_other_settings(where, before, now, force=False) -> list[str]:
    """Raise ValueError if a run in `where` has other settings; with `force` say so. Returns the keys that changed."""
    changed = [key for key in sorted(before.keys() & now.keys()) if before[key] != now[key]]
    for key in changed:
        if not force or key in NEVER_TO_CHANGE:
            way = "" if key in NEVER_TO_CHANGE else ", or --force to go on all the same"
            raise ValueError(
                f"{where} is of a run with {key} {before[key]}, this one has {now[key]}: "
                f"choose another --output-dir or delete that folder{way}"
            )
        print(f"Goes on with {key} {now[key]}, which was {before[key]} (--force)")
    return changed


def chooses_on_test(self) -> bool:
    """Whether TEST.FINAL_MODEL best_val would choose the epoch on images that the run is tested on."""
    test = self.cfg.TEST if getattr(self, "cfg", None) is not None else None
    if test is None or test.FINAL_MODEL != "best_val" or test.NO_TEST or not hasattr(self, "dm"):
        return False
    data = self.dm.dataset
    tested = {item.impath for item in data.test or ()}
    return not data.val or any(item.impath in tested for item in data.val)


def _class_names(self):
    names = getattr(getattr(getattr(self, "dm", None), "dataset", None), "classnames", None)
    return None if names is None else list(map(str, names))


def saved_epochs(folder) -> set[int]:
    """The numbers N of the files model.pth.tar-N in `folder`."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return {int(found[1]) for name in names if (found := re.fullmatch(r"model\.pth\.tar-(\d+)", name))}


# -- random numbers --------------------------------------------------------------------------------------------


def _rng_state():
    """Plain values and tensors, so that it loads with weights_only=True."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_rng_state(state):
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
