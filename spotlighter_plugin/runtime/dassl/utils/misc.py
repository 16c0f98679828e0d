"""Seeds and the description of the machine."""

import platform
import random

import numpy as np
import PIL
import torch


def set_random_seed(seed) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def tolist_if_not(x) -> list:
    return x if isinstance(x, list) else [x]


def collect_env_info() -> str:
    """Versions and devices in a few lines, for the top of a log."""
    if torch.cuda.is_available():
        device = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    else:
        device = f"CPU ({torch.get_num_threads()} threads)"
    return "\n".join(
        [
            f"Python: {platform.python_version()} on {platform.platform()}",
            f"PyTorch: {torch.__version__} (CUDA {torch.version.cuda})",
            f"NumPy: {np.__version__}  Pillow: {PIL.__version__}",
            f"Device: {device}",
        ]
    )
