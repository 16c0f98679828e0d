"""Small CLIPs with random weights, for every test that needs a backbone."""

import torch
from clip.model import CLIP

from spotlighter_plugin.towers.clip import save_compact, tokenize

CLASS_NAMES = ["red", "green", "blue", "yellow", "dark grey", "sea shell"]
SIZE = 32  # pixels: 16 patches of 8


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
