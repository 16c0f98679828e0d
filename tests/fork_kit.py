"""The real forks with small random weights and a data set of a few images, for tests that run their train.py.

SPOTLIGHTER_UPSTREAM names a folder with checkouts of CoOp, multimodal-prompt-learning, PromptKD and CLIPFit, and of
Dassl as `dassl`.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from clip.model import CLIP
from PIL import Image

UPSTREAM = Path(os.environ.get("SPOTLIGHTER_UPSTREAM", "absent"))
ROOT = Path(__file__).resolve().parent.parent
INSTALLED = tempfile.TemporaryDirectory()  # the package alone, as pip installs it: forks have a trainers/ of their own
Path(INSTALLED.name, "spotlighter_plugin").symlink_to(ROOT / "spotlighter_plugin")
CLASSES = {
    "banded": "red",
    "blotchy": "green",
    "cracked": "blue",
    "dotted": "yellow",
    "woven": "black",
    "zigzagged": "white",
}
MORE = {"bubbly": "orange", "fibrous": "purple", "lined": "grey", "waffled": "brown"}
SHORT_RUN = [
    *("DATASET.NUM_SHOTS", "2", "OPTIM.MAX_EPOCH", "1", "INPUT.SIZE", "(32, 32)"),
    *("DATALOADER.TRAIN_X.BATCH_SIZE", "4", "DATALOADER.NUM_WORKERS", "0"),
]


@dataclass(frozen=True)
class Fork:
    """A fork by its folder, the names of its host's trainer and configuration, and widths that its code accepts."""

    folder: str
    host: str
    config: str
    trainer: str
    embed: int = 64
    vision: int = 64
    text: int = 64


FORKS = {
    "CoOp": Fork("CoOp", "CoOp", "vit_b16", "CoOpSpotlighter"),
    "MaPLe": Fork(
        "multimodal-prompt-learning", "MaPLe", "vit_b16_c2_ep5_batch4_2ctx", "MaPLeSpotlighter", 512, 768, 512
    ),
    "PromptKD": Fork("PromptKD", "PromptKD", "vit_b16_c2_ep20_batch8_4+4ctx", "PromptKDSpotlighter", 512),
    "CLIPFit": Fork("CLIPFit/CLIPFit", "ClipFit", "vit_b16_ep30", "CLIPFitSpotlighter"),
}


def save_clip(path, embed, vision, text, size=32, patch=8):
    """Write the state of a CLIP with random weights: 16 tokens of 8 pixels, two blocks, the whole vocabulary."""
    torch.manual_seed(0)
    model = CLIP(embed, size, 2, vision, patch, 77, 49408, text, text // 64, 2)
    torch.save({key: value.half() for key, value in model.state_dict().items()}, path)


def make(name, folder):
    """A copy of the fork in `folder`/fork, its weights where it looks for them, and a data set in `folder`/data."""
    fork, copy = FORKS[name], folder / "fork"
    shutil.copytree(
        UPSTREAM / fork.folder, copy, ignore=shutil.ignore_patterns(".git", "*.png", "*.jpg", "Dassl.pytorch")
    )
    save_clip(folder / "clip.pt", fork.embed, fork.vision, fork.text)
    provide_weights(folder / "clip.pt", copy, folder)
    provide_pictures(folder)
    return copy


def provide(copy, folder, embed, size, patch):
    """Weights of the widths that hosts take for granted where any fork looks for them, and the data sets."""
    save_clip(folder / "clip.pt", embed, 768, 512, size, patch)
    provide_weights(folder / "clip.pt", copy, folder)
    provide_pictures(folder, CLASSES | MORE)
    for part in ("train", "val"):
        for n, name in enumerate(sorted(CLASSES | MORE)):
            shutil.copytree(folder / "data/dtd/images" / name, folder / f"data/imagenet/images/{part}/n{n:08d}")
    lines = [f"n{n:08d} {name}\n" for n, name in enumerate(sorted(CLASSES | MORE))]
    (folder / "data/imagenet/classnames.txt").write_text("".join(lines))


def provide_weights(weights, copy, folder):
    """Let a fork's clip find the weights: they are downloaded from a URL that holds their checksum, or (PromptKD's) lie
    in its folder, with a teacher's beside them."""
    if (copy / "teacher_model").is_dir():
        shutil.move(weights, copy / "clip/ViT-B-16.pt")
        save_clip(copy / "clip/ViT-L-14.pt", 768, 64, 64)
        teacher = copy / "teacher_model/DescribableTextures/VLPromptLearner"
        teacher.mkdir(parents=True)
        state = {"prompt_learner.ctx": torch.randn(4, 64) * 0.02}
        torch.save({"state_dict": state, "epoch": 1}, teacher / "model-best.pth.tar")
        return
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    (folder / checksum).mkdir()
    shutil.move(weights, folder / checksum / "ViT-B-16.pt")
    url = (folder / checksum / "ViT-B-16.pt").as_uri()
    for code in copy.rglob("clip*/clip.py"):
        code.write_text(re.sub(r'("ViT-B/16":\s*)".*"', rf'\1"{url}"', code.read_text()))


def provide_pictures(folder, classes=CLASSES):
    """A data set in `folder`/data."""
    for texture, colour in classes.items():
        for i in range(8):
            path = folder / f"data/dtd/images/{texture}/{texture}_{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32 + i, 32), colour).save(path)


def execute(copy, *command, dassl="dassl"):
    """Run a command in the fork, on a checkout of Dassl; what it printed, and its exit code."""
    path = [INSTALLED.name, str(UPSTREAM / dassl), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "HOME": str(copy.parent), "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=copy, env=env, capture_output=True, text=True, timeout=900)
    return done.stdout, done.stderr, done.returncode


def flags(copy, trainer, config, *options):
    """Flags of a short run."""
    return [
        *("--root", str(copy.parent / "data"), "--seed", "1", "--trainer", trainer),
        *("--dataset-config-file", "configs/datasets/dtd.yaml", "--config-file", f"configs/trainers/{config}.yaml"),
        *("--output-dir", f"output/{trainer}", *options, *SHORT_RUN),
    ]
