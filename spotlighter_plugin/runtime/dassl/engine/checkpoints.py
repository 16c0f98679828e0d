"""Saving, loading, and continuing a run so that the continued one equals the uninterrupted one.

These are functions over any trainer with Dassl's tables `_models`, `_optims`, `_scheds`; TrainerBase takes them as
methods, and compat.py gives them to the real Dassl's TrainerBase too. The generators of random numbers and the best
result so far travel in each checkpoint under "training_state".
"""

import os
import random
import re

import numpy as np
import torch

from ..utils import load_checkpoint, resume_from_checkpoint, save_checkpoint


def save_model(self, epoch, directory, is_best=False, val_result=None, model_name=""):
    """Save each registered model to `directory`/<name>/model.pth.tar-<epoch + 1> (or `model_name`)."""
    state = {"rng": _rng_state(), "best_result": float(getattr(self, "best_result", -np.inf))}
    for name in self.get_model_names():
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


def load_model(self, directory, epoch=None):
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
        self._models[name].load_state_dict(checkpoint["state_dict"])
        print(f"Load {path} to {name} (epoch={checkpoint['epoch']}, val_result={checkpoint.get('val_result')})")


def resume_model_if_exist(self, directory):
    """Load the last epoch that every registered model has in `directory`; returns it, 0 where there is none.

    Raises FileNotFoundError when that folder was asked for by --resume and has no checkpoint.
    """
    names = self.get_model_names()
    epochs = set.intersection(*(saved_epochs(os.path.join(directory, name)) for name in names)) if names else set()
    if not epochs:
        if getattr(self, "cfg", None) is not None and self.cfg.RESUME == directory != "":
            raise FileNotFoundError(f"--resume {directory}: no checkpoint of {', '.join(names)} in that folder")
        print("No checkpoint found, train from scratch")
        return 0
    last = f"model.pth.tar-{max(epochs)}"
    print(f"Found checkpoint at {directory} (will resume training)")
    for name in names:
        folder = os.path.join(directory, name)
        epoch = resume_from_checkpoint(folder, self._models[name], self._optims[name], self._scheds[name], last)
    state = load_checkpoint(os.path.join(directory, names[0], last)).get("training_state")
    if state is None:
        print("The checkpoint holds no random-number state: the rest of the run will draw differently")
    else:
        self.best_result = state["best_result"]
        _set_rng_state(state["rng"])
    return epoch


def saved_epochs(folder):
    """The numbers N of the files model.pth.tar-N in `folder`."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return {int(found[1]) for name in names if (found := re.fullmatch(r"model\.pth\.tar-(\d+)", name))}


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
