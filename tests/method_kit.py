"""What the tests of the method share: a small random host and a wrapper around it."""

import torch
from dassl.config import get_cfg_default
from random_clips import CLASS_NAMES, SIZE, random_clip

import trainers.coop as coop
from spotlighter_plugin.config import LOSSES, SpotlighterConfig
from spotlighter_plugin.towers.clip import apply_precision
from spotlighter_plugin.wrapper import SpotlighterWrapper

N_TOKENS, WIDTH, DIM, HEADS, BLOCKS = 16, 128, 64, 2, 3
MAPPINGS = ("none", "full", "linear+linear", "transformer+transformer", "transformer+linear")


def coop_host(class_names=CLASS_NAMES, seed=0, precision="fp32"):
    """CoOp on a random CLIP; the context vectors are the only trained parameters."""
    cfg = get_cfg_default()
    coop.extend_cfg(cfg)
    cfg.TRAINER.COOP.N_CTX = 2
    clip_model = apply_precision(random_clip(seed).requires_grad_(False), precision)
    torch.manual_seed(seed)
    return coop.CustomCLIP(cfg, list(class_names), clip_model)


def wrap(host=None, class_names=CLASS_NAMES, **options):
    """A wrapped CoOp with k = 6, P = 3, s = L-1; without a preset also with every loss and without a fused token."""
    torch.manual_seed(1)
    plain = {} if "preset" in options else {"losses": LOSSES, "fuse_dropped": False}
    options = {"top_k": 6, "prototypes": 3, "select_block": -1, **plain, **options}
    return SpotlighterWrapper(host or coop_host(class_names), SpotlighterConfig(**options), class_names=class_names)


def some_images(n=5, seed=0):
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def train_a_little(wrapper, steps=3, lr=0.05, labels=None, seed=0):
    """A few steps of gradient descent on everything that is trained; returns the last step's losses."""
    wrapper.train()
    parameters = [p for p in wrapper.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    for step in range(steps):
        images = some_images(6, seed + step)
        output = wrapper(images, torch.arange(6) % 6 if labels is None else labels)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
    wrapper.eval()
    return output
