"""What the forks of CoOp, MaPLe, PromptKD and CLIPFit need to run on today's PyTorch, on top of compat.py.

Importing it, before Dassl is imported, applies it. It acts on the whole process: for a fork's train.py, not for a
program that has a use of its own for `.cuda()`.
"""

import warnings

import torch

from .. import compat


@compat.once
def stay_on_cpu() -> None:
    """The forks call `.cuda()` whatever the machine has (CLIPFit before it trains, PromptKD on its teacher), and build
    CLIP in half precision whatever PREC says (PromptKD's projection, MaPLe's). Without a GPU both are left out, as
    `clip.load` does on a CPU: everything stays there, in float32."""
    if torch.cuda.is_available():
        return
    for kind in (torch.Tensor, torch.nn.Module):
        kind.cuda = kind.half = lambda self, *args, **kwargs: self


@compat.once
def silence_old_amp() -> None:
    """torch.cuda.amp's GradScaler and autocast still work, with a FutureWarning on every batch under PREC amp."""
    warnings.filterwarnings("ignore", message=r"`torch\.cuda\.amp\.", category=FutureWarning)


stay_on_cpu()
silence_old_amp()
