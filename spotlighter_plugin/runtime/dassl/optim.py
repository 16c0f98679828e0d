"""Optimizers and learning-rate schedules by name, from the OPTIM node of the configuration."""

import torch
from torch import nn, optim
from torch.optim import lr_scheduler

OPTIMIZERS = {
    "sgd": lambda params, c: optim.SGD(
        params,
        lr=c.LR,
        momentum=c.MOMENTUM,
        weight_decay=c.WEIGHT_DECAY,
        dampening=c.SGD_DAMPNING,
        nesterov=c.SGD_NESTEROV,
    ),
    "adam": lambda params, c: optim.Adam(params, **_adaptive(c)),
    "amsgrad": lambda params, c: optim.Adam(params, amsgrad=True, **_adaptive(c)),
    "adamw": lambda params, c: optim.AdamW(params, **_adaptive(c)),
    "radam": lambda params, c: optim.RAdam(params, **_adaptive(c)),
    "rmsprop": lambda params, c: optim.RMSprop(
        params, lr=c.LR, momentum=c.MOMENTUM, weight_decay=c.WEIGHT_DECAY, alpha=c.RMSPROP_ALPHA
    ),
}


def _adaptive(c):
    return {"lr": c.LR, "weight_decay": c.WEIGHT_DECAY, "betas": (c.ADAM_BETA1, c.ADAM_BETA2)}


def build_optimizer(model, optim_cfg, param_groups=None) -> optim.Optimizer:
    """The optimizer OPTIM.NAME over `param_groups`, or over a module's (or iterable's) parameters.

    With OPTIM.STAGED_LR the children not named in OPTIM.NEW_LAYERS learn at BASE_LR_MULT times the rate.
    """
    if optim_cfg.NAME not in OPTIMIZERS:
        raise ValueError(f"OPTIM.NAME {optim_cfg.NAME!r} is not one of {sorted(OPTIMIZERS)}")
    if param_groups is None:
        if optim_cfg.STAGED_LR:
            param_groups = _staged_groups(model, optim_cfg)
        else:
            param_groups = model.parameters() if isinstance(model, nn.Module) else model
    return OPTIMIZERS[optim_cfg.NAME](param_groups, optim_cfg)


def _staged_groups(model, optim_cfg):
    if not isinstance(model, nn.Module):
        raise ValueError("OPTIM.STAGED_LR needs a module, not a list of parameters")
    new = [optim_cfg.NEW_LAYERS] if isinstance(optim_cfg.NEW_LAYERS, str) else optim_cfg.NEW_LAYERS
    base_params, new_params = [], []
    for name, child in model.named_children():
        (new_params if name in new else base_params).extend(child.parameters())
    return [{"params": base_params, "lr": optim_cfg.LR * optim_cfg.BASE_LR_MULT}, {"params": new_params}]


class WarmupScheduler(lr_scheduler.LRScheduler):
    """Gives the rate during the first `warmup_epoch` epochs, then hands over to `successor`.

    constant: the rate is `floor` throughout. linear: `floor` in the first epoch, then base rate x epoch / warmup_epoch.
    """

    def __init__(self, optimizer, successor, warmup_epoch, kind, floor):
        self.successor, self.warmup_epoch, self.kind, self.floor = successor, warmup_epoch, kind, floor
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        if self.last_epoch >= self.warmup_epoch:
            return self.successor.get_last_lr()
        if self.kind == "constant" or self.last_epoch == 0:
            return [self.floor] * len(self.base_lrs)
        return [rate * self.last_epoch / self.warmup_epoch for rate in self.base_lrs]

    def step(self, epoch=None) -> None:
        if self.last_epoch < self.warmup_epoch:
            super().step(epoch)
        else:
            self.successor.step(epoch)
            self._last_lr = self.successor.get_last_lr()

    def state_dict(self) -> dict:
        """Plain values only, so that a checkpoint loads with weights_only=True."""
        return {**super().state_dict(), "successor": self.successor.state_dict()}

    def load_state_dict(self, state_dict) -> None:
        state = dict(state_dict)
        self.successor.load_state_dict(state.pop("successor"))
        super().load_state_dict(state)


def build_lr_scheduler(optimizer, optim_cfg) -> lr_scheduler.LRScheduler:
    """The schedule OPTIM.LR_SCHEDULER (single_step, multi_step, cosine), after a warm-up if WARMUP_EPOCH > 0.

    WARMUP_RECOUNT: the schedule starts at its own epoch 0 after the warm-up; otherwise at epoch WARMUP_EPOCH.
    """
    scheduler = _main_schedule(optimizer, optim_cfg)
    if optim_cfg.WARMUP_EPOCH <= 0:
        return scheduler
    floors = {"constant": optim_cfg.WARMUP_CONS_LR, "linear": optim_cfg.WARMUP_MIN_LR}
    if optim_cfg.WARMUP_TYPE not in floors:
        raise ValueError(f"OPTIM.WARMUP_TYPE {optim_cfg.WARMUP_TYPE!r} is not one of {sorted(floors)}")
    if not optim_cfg.WARMUP_RECOUNT:
        scheduler.last_epoch = optim_cfg.WARMUP_EPOCH
    kind = optim_cfg.WARMUP_TYPE
    return WarmupScheduler(optimizer, scheduler, optim_cfg.WARMUP_EPOCH, kind, floors[kind])


def _main_schedule(optimizer: torch.optim.Optimizer, c):
    several = isinstance(c.STEPSIZE, (list, tuple))
    if c.LR_SCHEDULER == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, float(c.MAX_EPOCH))
    if c.LR_SCHEDULER == "single_step":
        size = c.STEPSIZE[-1] if several else c.STEPSIZE
        if not isinstance(size, int):
            raise ValueError(f"OPTIM.STEPSIZE must be an integer for single_step, not {size!r}")
        return lr_scheduler.StepLR(optimizer, size if size > 0 else c.MAX_EPOCH, gamma=c.GAMMA)
    if c.LR_SCHEDULER == "multi_step":
        if not several:
            raise ValueError(f"OPTIM.STEPSIZE must be a list for multi_step, not {c.STEPSIZE!r}")
        return lr_scheduler.MultiStepLR(optimizer, c.STEPSIZE, gamma=c.GAMMA)
    raise ValueError(f"OPTIM.LR_SCHEDULER {c.LR_SCHEDULER!r} is not one of ['cosine', 'multi_step', 'single_step']")
