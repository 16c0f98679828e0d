"""What the tests share: small CLIPs with random weights, a host on one of them and a wrapper around it."""

import torch
from clip.model import CLIP
from dassl.config import get_cfg_default

import trainers.coop as coop
from spotlighter_plugin.config import LOSSES, SpotlighterConfig
from spotlighter_plugin.towers.clip import apply_precision, save_compact, tokenize
from spotlighter_plugin.wrapper import SpotlighterWrapper

CLASS_NAMES = ["red", "green", "blue", "yellow", "dark grey", "sea shell"]
SIZE = 32  # pixels: 16 patches of 8
N_TOKENS, WIDTH, DIM, HEADS, BLOCKS = 16, 128, 64, 2, 3
MAPPINGS = ("none", "full", "linear+linear", "transformer+transformer", "transformer+linear")


def random_clip(seed=0, embed=64, vision=128, text=64, layers=3):
    """A CLIP of OpenAI's architecture with random weights, as load_clip would return it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIP(embed, SIZE, layers, vision, 8, 77, 49408, text, text // 64, layers)
        for name, parameter in model.named_parameters():  # OpenAI's initial biases are zero, and blocks start alike
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.02)
    return model.float().eval()


def save_random_clip(path, **shape):
    """Write a random CLIP as compact safetensors (a whole vocabulary would be 13 MB); returns the path."""
    rows = tokenize([f"a photo of a {name}, X." for name in CLASS_NAMES]).unique().long()
    save_compact(random_clip(**shape).state_dict(), path, {"recipe": "random"}, rows)
    return str(path)


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
