"""Checkpoints and weights: saved aside and renamed, read without running anything that they contain."""

import os
import pickle
import types
import warnings

import torch
from torch import nn


def count_num_param(model=None, params=None):
    """Number of scalars in a model's parameters, or in an iterable of tensors or optimizer groups."""
    if model is None and params is None:
        raise ValueError("count_num_param needs a model or params")
    tensors = model.parameters() if model is not None else (p["params"] if isinstance(p, dict) else p for p in params)
    return sum(p.numel() for p in tensors)


def save_checkpoint(state, save_dir, is_best=False, remove_module_from_keys=True, model_name=""):
    """Write `state` to `save_dir`/model.pth.tar-<epoch> (or `model_name`) and its name to `save_dir`/checkpoint."""
    os.makedirs(save_dir, exist_ok=True)
    if remove_module_from_keys:
        state = {**state, "state_dict": {k.removeprefix("module."): v for k, v in state["state_dict"].items()}}
    name = model_name or f"model.pth.tar-{state['epoch']}"
    path = os.path.join(save_dir, name)
    _write_aside(path, lambda file: torch.save(state, file))
    _write_aside(os.path.join(save_dir, "checkpoint"), lambda file: file.write(f"{name}\n".encode()))
    print(f"Checkpoint saved to {path}")
    if is_best:
        _write_aside(os.path.join(save_dir, "model-best.pth.tar"), lambda file: torch.save(state, file))


def _write_aside(path, write):
    aside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def load_checkpoint(fpath):
    """The dictionary in `fpath`, tensors on the CPU where there is no GPU.

    Raises FileNotFoundError, or ValueError for a damaged file. Tensors and plain values only: where a checkpoint of
    the real Dassl carries a whole scheduler object, it comes back as an inert placeholder, never executed.
    """
    if not fpath or not os.path.exists(fpath):
        raise FileNotFoundError(f"no checkpoint at {fpath}")
    device = None if torch.cuda.is_available() else "cpu"
    try:
        try:
            return torch.load(fpath, map_location=device, weights_only=True)
        except pickle.UnpicklingError:
            return torch.load(fpath, map_location=device, weights_only=False, pickle_module=_inert_pickle)
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{fpath} is no readable checkpoint ({reason})") from error


class _Inert:
    """Stands for an object of a class that we do not load: takes any state, does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    def extend(self, items):
        pass


class _InertUnpickler(pickle.Unpickler):
    """Resolves tensors' own rebuilding functions and dtypes; every other global becomes `_Inert`."""

    def find_class(self, module, name):
        harmless = (
            (module == "collections" and name == "OrderedDict")
            or (module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"))
            or (module == "torch" and name.endswith("Storage"))
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
            or (module == "torch.storage" and name in ("TypedStorage", "UntypedStorage"))
        )
        return super().find_class(module, name) if harmless else _Inert


_inert_pickle = types.SimpleNamespace(
    Unpickler=_InertUnpickler, load=lambda file, **kwargs: _InertUnpickler(file, **kwargs).load(), __name__="inert"
)


def resume_from_checkpoint(fdir, model, optimizer=None, scheduler=None, fname=None):
    """Load weights, optimizer and scheduler from `fdir`/`fname` (default: the last one saved); returns its epoch."""
    if fname is None:
        with open(os.path.join(fdir, "checkpoint"), encoding="utf-8") as file:
            fname = file.readline().strip()
    path = os.path.join(fdir, fname)
    checkpoint = load_checkpoint(path)
    model.load_state_dict(checkpoint["state_dict"])
    if optimizer is not None and checkpoint.get("optimizer"):
        optimizer.load_state_dict(checkpoint["optimizer"])
    if scheduler is not None and checkpoint.get("scheduler"):
        scheduler.load_state_dict(checkpoint["scheduler"])
    print(f"Resumed from {path} (epoch {checkpoint['epoch']})")
    return checkpoint["epoch"]


def load_pretrained_weights(model, weight_path):
    """Copy those tensors of a checkpoint whose name and shape the model has; names the rest."""
    checkpoint = load_checkpoint(weight_path)
    source = {k.removeprefix("module."): v for k, v in checkpoint.get("state_dict", checkpoint).items()}
    own = model.state_dict()
    fitting = {k: v for k, v in source.items() if k in own and own[k].shape == v.shape}
    if not fitting:
        warnings.warn(f"nothing in {weight_path} fits the model: compare the key names", stacklevel=2)
        return
    model.load_state_dict({**own, **fitting})
    print(f"Loaded {len(fitting)} tensors from {weight_path}")
    if left := sorted(source.keys() - fitting.keys()):
        print(f"Left out (other name or shape): {left}")


def open_all_layers(model):
    """Train everything."""
    model.train()
    model.requires_grad_(True)


def open_specified_layers(model, open_layers):
    """Train only the named children; freeze the others and put them in evaluation mode."""
    wanted = [open_layers] if isinstance(open_layers, str) else list(open_layers)
    children = dict(model.named_children())
    if missing := [name for name in wanted if name not in children]:
        raise ValueError(f"the model has no layer {missing}; it has {sorted(children)}")
    for name, child in children.items():
        child.train(name in wanted)
        child.requires_grad_(name in wanted)


def init_network_weights(model, init_type="normal", gain=0.02):
    """Initialise convolutions and linear layers (normal, xavier, kaiming, orthogonal); norms to one and zero."""
    fill = {
        "normal": lambda w: nn.init.normal_(w, 0.0, gain),
        "xavier": lambda w: nn.init.xavier_normal_(w, gain=gain),
        "kaiming": lambda w: nn.init.kaiming_normal_(w, a=0, mode="fan_in"),
        "orthogonal": lambda w: nn.init.orthogonal_(w, gain=gain),
    }
    if init_type not in fill:
        raise ValueError(f"init_type {init_type!r} is not one of {sorted(fill)}")
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            fill[init_type](module.weight)
        elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
            if module.weight is not None:
                nn.init.ones_(module.weight)
        else:
            continue
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
