"""What the forks of CoOp, MaPLe, PromptKD and CLIPFit need to run on today's PyTorch, on top of compat.py.

Importing it, before Dassl is imported, applies it. It acts on the whole process: for a fork's train.py, not for a
program that has a use of its own for `.cuda()`.
"""

import functools
import sys
import warnings

import numpy
import torch

from .. import compat


@compat.once
def stay_on_cpu() -> None:
    """The forks call `.cuda()` or `.to("cuda")` whatever the machine has (CLIPFit before it trains, PromptKD on its
    teacher), and build CLIP in half precision whatever PREC says (PromptKD's projection, MaPLe's). Without a GPU all
    are left out, as `clip.load` does on a CPU: everything stays there, in float32."""
    if torch.cuda.is_available():
        return
    for kind in (torch.Tensor, torch.nn.Module):
        kind.cuda = kind.half = lambda self, *args, **kwargs: self
        kind.to = _without_gpu(kind.to)


def _without_gpu(to):
    def here(value):
        is_gpu = isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"
        return torch.device("cpu") if is_gpu else value

    @functools.wraps(to)
    def moved(self, *args, **kwargs):
        return to(self, *map(here, args), **{name: here(value) for name, value in kwargs.items()})

    return moved


@compat.once
def silence_old_amp() -> None:
    """torch.cuda.amp's GradScaler and autocast still work, with a FutureWarning on every batch under PREC amp."""
    warnings.filterwarnings("ignore", message=r"`torch\.cuda\.amp\.", category=FutureWarning)


@compat.once
def name_numpys_types() -> None:
    """Dassl's RandAugment (in CoPrompt's configuration) and old forks say `np.int` and `np.float`, which NumPy 1.24
    took away."""
    for kind in (int, float):
        if not hasattr(numpy, kind.__name__):
            setattr(numpy, kind.__name__, kind)


@compat.once
def differentiate_attention_twice() -> None:
    """PyTorch's fused attention has no second derivative, which an inner loop (ProMetaR's, by learn2learn) asks for."""
    for name in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{name}_sdp", lambda on: None)(False)


sys.meta_path.insert(0, compat.Mended("learn2learn", after=differentiate_attention_twice))
stay_on_cpu()
silence_old_amp()
name_numpys_types()
