"""Checkpoints and weights: saved aside and renamed, read without running anything that they contain."""

import os
import pickle
import re
import types
import warnings

import torch
from torch import nn

from spotlighter_plugin import files
from spotlighter_plugin.errors import one_line
from spotlighter_plugin.files import refuse_deleted, regular, write_aside


def count_num_param(model=None, params=None) -> int:
    """Number of scalars in a model's parameters, or in an iterable of tensors or optimizer groups."""
    if model is None and params is None:
        raise ValueError("count_num_param needs a model or params")
    tensors = model.parameters() if model is not None else (p["params"] if isinstance(p, dict) else p for p in params)
    return sum(p.numel() for p in tensors)


def save_checkpoint(state, save_dir, is_best=False, remove_module_from_keys=True, model_name="") -> None:
    """Write `state` to `save_dir`/model.pth.tar-<epoch> (or `model_name`) and its name to `save_dir`/checkpoint.

    Raises: FloatingPointError (a tensor is not finite: nothing is written), OSError; one line.
    """
    if remove_module_from_keys:
        state = {**state, "state_dict": _without_module(state["state_dict"])}
    name = model_name or f"model.pth.tar-{state['epoch']}"
    path = os.path.join(save_dir, name)
    require_finite(state["state_dict"], f"{path} is not written")
    if not files.writes:
        return
    refuse_deleted(path)
    os.makedirs(save_dir, exist_ok=True)
    write_aside(path, lambda file: torch.save(state, file))
    write_aside(os.path.join(save_dir, "checkpoint"), lambda file: file.write(f"{name}\n".encode()))
    print(f"Checkpoint saved to {path}")
    if is_best:
        write_aside(os.path.join(save_dir, "model-best.pth.tar"), lambda file: torch.save(state, file))


def require_finite(state_dict, what) -> None:
    """Raise FloatingPointError, naming the first tensor that holds nan or inf; `what` comes of it."""
    for key, value in state_dict.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise FloatingPointError(f"{key} holds nan or inf: {what}")


def _without_module(state_dict):
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def load_checkpoint(fpath) -> dict:
    """The checkpoint in `fpath` as a dictionary with `state_dict` and `epoch`, on the CPU where there is no GPU.

    A bare state dict is taken for one, the prefix `module.` of parallel training left off. Tensors and plain values
    only: where a checkpoint of the real Dassl carries a whole scheduler object, it comes back as an inert placeholder,
    never executed.

    Raises: FileNotFoundError; ValueError (damaged, or no checkpoint), FloatingPointError (nan in it); one line.
    """
    if not fpath or not os.path.exists(fpath):
        raise FileNotFoundError(f"no checkpoint at {fpath}")
    content = _read(regular(fpath))
    if isinstance(content, dict) and content and "state_dict" not in content:
        content = {"state_dict": content}
    state = content.get("state_dict") if isinstance(content, dict) else None  # empty of a model without any
    if not isinstance(state, dict) or not all(map(_is_tensor, state.items())):
        raise ValueError(f"{fpath} is no checkpoint: it holds no state_dict, a dictionary of named tensors")
    require_finite(state, f"{fpath} is of no use")
    number = re.search(r"\.tar-(\d+)$", os.fspath(fpath))
    epoch = content.get("epoch")
    if type(epoch) is not int:
        epoch = int(number[1]) if number else None
    return {**content, "state_dict": _without_module(state), "epoch": epoch}


def _is_tensor(item):
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def _read(fpath):
    device = None if torch.cuda.is_available() else "cpu"
    with open(fpath, "rb") as file:  # what cannot be read says so itself; whatever comes up after is damage
        file.read(1)
    try:
        try:
            return torch.load(fpath, map_location=device, weights_only=True)
        except pickle.UnpicklingError:
            return torch.load(fpath, map_location=device, weights_only=False, pickle_module=_inert_pickle)
    except Exception as error:  # whatever a damaged pickle makes its reader do
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


class _InertUnpickler(files.Unpickler):
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


def own_class_tokens(key) -> bool:
    """Whether a tensor holds the model's own class names as tokens: another run's are never loaded."""
    return key.split(".")[-1].startswith(("token_prefix", "token_suffix"))


def load_weights(module, state_dict, source, whole=False) -> None:
    """Load what a checkpoint has for `module`, apart from the tokens of its class names.

    Args:
        source: the checkpoint's path, for messages.
        whole: a state to go on from, which must hold what the module has, and nothing else.

    Raises: ValueError, one line: a tensor has another shape, nothing in it belongs to a trained parameter, something
        is missing or over, or there is a context for each class, of other class names.
    """
    own, given = module.state_dict(), {k: v for k, v in state_dict.items() if not own_class_tokens(k)}
    for key, parameter in module.named_parameters():  # buffers may grow: the module itself knows how
        value = given.get(key, parameter)
        if value.shape != parameter.shape:
            raise ValueError(
                f"{source} holds {key} of shape {tuple(value.shape)}, the model wants {tuple(parameter.shape)}: "
                "give the options and the backbone that it was trained with"
            )
    trained = {key for key, parameter in module.named_parameters() if parameter.requires_grad}
    if trained and not trained & given.keys():
        raise ValueError(f"{source} holds none of the trained parameters ({min(trained)}, …): it is another model's")
    other = {key for key in own if not own_class_tokens(key)} ^ given.keys()
    if whole and other:
        raise ValueError(f"{source} is another model's: {min(other)} is not in both")
    if any(key.endswith("ctx") and value.ndim == 3 for key, value in given.items()):
        for key, value in state_dict.items():
            same = key not in own or own[key].shape == value.shape and torch.allclose(
                own[key].float().cpu(), value.float().cpu(), atol=1e-3
            )  # fmt: skip
            if own_class_tokens(key) and not same:
                raise ValueError(f"{source} holds a context for each class, of other class names than the model's")
    try:
        module.load_state_dict(given, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{source}: {one_line(error)}") from None


def resume_from_checkpoint(fdir, model, optimizer=None, scheduler=None, fname=None) -> int:
    """Load weights, optimizer and scheduler from `fdir`/`fname` (default: the last one saved); returns its epoch."""
    if fname is None:
        with open(os.path.join(fdir, "checkpoint"), encoding="utf-8") as file:
            fname = file.readline().strip()
    path = os.path.join(fdir, fname)
    checkpoint = load_checkpoint(path)
    load_weights(model, checkpoint["state_dict"], path, whole=True)
    load_progress(checkpoint, path, optimizer, scheduler)
    print(f"Resumed from {path} (epoch {checkpoint['epoch']})")
    return checkpoint["epoch"]


def load_progress(checkpoint, source, *parts) -> None:
    """Load the states of optimizer, scheduler (and scaler) from a checkpoint, where it has them.

    Raises: ValueError, one line: a state is another optimizer's, or damaged.
    """
    for name, part in zip(("optimizer", "scheduler", "scaler"), parts, strict=False):
        if part is not None and checkpoint.get(name):
            try:
                part.load_state_dict(checkpoint[name])
            except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
                raise ValueError(
                    f"{source} holds the state of another {name} ({' '.join(str(error).split())})"
                ) from None


def load_pretrained_weights(model, weight_path) -> None:
    """Copy what a checkpoint has of a model's tensors in their shapes, never class names' tokens; names the rest."""
    source = load_checkpoint(weight_path)["state_dict"]
    own = model.state_dict()
    fitting = {k: v for k, v in source.items() if k in own and own[k].shape == v.shape and not own_class_tokens(k)}
    if not fitting:
        warnings.warn(f"nothing in {weight_path} fits the model: compare the key names", stacklevel=2)
        return
    model.load_state_dict({**own, **fitting})
    print(f"Loaded {len(fitting)} tensors from {weight_path}")
    if left := sorted(source.keys() - fitting.keys()):
        print(f"Left out (other name or shape, or class names' tokens): {left}")


def open_all_layers(model) -> None:
    """Train everything."""
    model.train()
    model.requires_grad_(True)


def open_specified_layers(model, open_layers) -> None:
    """Train only the named children; freeze the others and put them in evaluation mode."""
    wanted = [open_layers] if isinstance(open_layers, str) else list(open_layers)
    children = dict(model.named_children())
    if missing := [name for name in wanted if name not in children]:
        raise ValueError(f"the model has no layer {missing}; it has {sorted(children)}")
    for name, child in children.items():
        child.train(name in wanted)
        child.requires_grad_(name in wanted)


def init_network_weights(model, init_type="normal", gain=0.02) -> None:
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
