"""How heavy a match should weigh where it is to meet other domains: TRAINER.SPOTLIGHTER.MATCH_SLACK.

    python tools/slack.py

The untrained tiny CLIP remembers one vendor's clean shots of the base classes, and weighs the match on that vendor's
clean validation scenes with more and more slack. Printed is the accuracy, in percent, on these and on validation
scenes of the other vendor and of the other domains. No test scene and no new class is looked at.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper  # noqa: E402
from spotlighter_plugin.towers.clip import load_clip  # noqa: E402
from spotlighter_plugin.workbench.training.settings import import_trainers_and_datasets, parse, setup_cfg  # noqa: E402

SLACKS = (0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05)
OWN, OTHER = "twemoji", "noto-v1"
DOMAINS = {"pixel": "_pixel", "dark": "_dark", "swap": "_swap"}


def loaders(domain: str, vendor: str, root: str, modules):
    """The base classes' names, and the vendor's training and validation scenes of them in batches."""
    from dassl.data import DataManager
    from dassl.data.data_manager import build_data_loader
    from dassl.data.transforms import build_transform

    config = f"configs/datasets/emoji_scenes{domain}.yaml"
    flags = ["--trainer", "CoOp", "--dataset-config-file", config, "--root", root, "--seed", "1"]
    options = ["DATASET.SUBSAMPLE_CLASSES", "base", "DATASET.NUM_SHOTS", "32", "DATALOADER.NUM_WORKERS", "0"]
    with contextlib.redirect_stdout(io.StringIO()):
        cfg = setup_cfg(parse([*flags, *options]), modules)
        data = DataManager(cfg).dataset
        transform = build_transform(cfg, is_train=False)
    parts = (
        build_data_loader(
            cfg, "SequentialSampler", [item for item in items if Path(item.impath).name.startswith(vendor)], 128,
            tfm=transform, is_train=False,
        )
        for items in (data.train_x, data.val)
    )  # fmt: skip
    return data.classnames, *parts


@torch.no_grad()
def accuracy(wrapper, batches) -> float:
    """In percent."""
    right = [wrapper(batch["img"]).argmax(1).eq(batch["label"]) for batch in batches]
    return 100 * torch.cat(right).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    root, modules = parser.parse_args().root, import_trainers_and_datasets()
    names, shots, own = loaders("", OWN, root, modules)
    looked_at = {f"clean, {OWN}": own, f"clean, {OTHER}": loaders("", OTHER, root, modules)[2]}
    looked_at |= {f"{name}, {OWN}": loaders(part, OWN, root, modules)[2] for name, part in DOMAINS.items()}
    wrapper = SpotlighterWrapper(load_clip("tiny"), SpotlighterConfig(), class_names=names).eval()
    table = Table("slack", "sharpness", "weight", *looked_at)

    def add_row(name):
        memory, weight = wrapper.plugin.memory, wrapper.plugin.mapping.match_weight.item()
        cells = [f"{accuracy(wrapper, batches):.1f}" for batches in looked_at.values()]
        table.add_row(name, f"{memory.sharpness.item():g}", f"{weight:.0f}", *cells)

    add_row("no match")
    wrapper.remember((batch["img"], batch["label"]) for batch in shots)
    for wrapper.config.match_slack in SLACKS:
        wrapper.calibrate((batch["img"], batch["label"]) for batch in own)
        add_row(f"{wrapper.config.match_slack:g}")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
