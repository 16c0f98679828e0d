"""What the host tests share: small random CLIPs, a data set of coloured squares, and trainers built on both."""

import importlib.util

import torch
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.engine import build_trainer
from method_kit import CLASS_NAMES, SIZE, save_random_clip
from PIL import Image

from spotlighter_plugin import config

COLOURS = [(220, 30, 30), (30, 200, 40), (40, 60, 230), (230, 220, 40), (60, 60, 60), (240, 225, 210)]


class ColouredSquares(DatasetBase):
    """Six plain colours, four training and two test images each."""

    def __init__(self, cfg):
        train, val, test = self.draw(cfg, 4, "train"), self.draw(cfg, 2, "val"), self.draw(cfg, 2, "test")
        super().__init__(train_x=train, val=val, test=test)

    @staticmethod
    def draw(cfg, number, part):
        subsample = cfg.DATASET.SUBSAMPLE_CLASSES
        chosen = {"all": range(6), "base": range(3), "new": range(3, 6)}[subsample]
        items = []
        for label, index in enumerate(chosen):
            for n in range(number):
                path = f"{cfg.DATASET.ROOT}/{part}_{index}_{n}.png"
                shade = tuple(max(0, c - 5 * n) for c in COLOURS[index])
                Image.new("RGB", (SIZE, SIZE), shade).save(path)
                items.append(Datum(path, label, 0, CLASS_NAMES[index].replace(" ", "_")))
        return items


if "ColouredSquares" not in DATASET_REGISTRY.registered_names():
    DATASET_REGISTRY.register(ColouredSquares)


def make_cfg(folder, trainer, module, *options, backbone=None):
    """The options of a short run of `trainer` (defined in trainers/<module>.py) with everything in `folder`."""
    cfg = get_cfg_default()
    cfg.DATASET.SUBSAMPLE_CLASSES = "all"
    config.extend_cfg(cfg)
    for name in (module.removesuffix("_spotlighter"), module):
        if importlib.util.find_spec(f"trainers.{name}") is None:  # a host whose file has its Spotlighter, too
            continue
        trainer_module = importlib.import_module(f"trainers.{name}")
        if hasattr(trainer_module, "extend_cfg"):
            trainer_module.extend_cfg(cfg)
    (folder / "data").mkdir(exist_ok=True)
    cfg.merge_from_list(
        ["DATASET.NAME", "ColouredSquares", "DATASET.ROOT", str(folder / "data"), "OUTPUT_DIR", str(folder / "out")]
        + ["TRAINER.NAME", trainer, "MODEL.BACKBONE.NAME", backbone or save_random_clip(folder / "clip.safetensors")]
        + ["INPUT.SIZE", (SIZE, SIZE), "INPUT.TRANSFORMS", ["normalize"], "USE_CUDA", False, "SEED", 1]
        + ["DATALOADER.NUM_WORKERS", 0, "DATALOADER.TRAIN_X.BATCH_SIZE", 12, "DATALOADER.TEST.BATCH_SIZE", 12]
        + ["OPTIM.NAME", "sgd", "OPTIM.LR", 0.05, "OPTIM.MAX_EPOCH", 2, "TEST.NO_TEST", True]
    )
    cfg.merge_from_list(list(options))
    return cfg


def make_trainer(folder, trainer, module, *options, backbone=None):
    """A trainer on ColouredSquares with a random CLIP."""
    cfg = make_cfg(folder, trainer, module, *options, backbone=backbone)
    torch.manual_seed(cfg.SEED)
    return build_trainer(cfg)


def train_teacher(folder, *options):
    """Options that name a PromptSRC teacher of another width, trained for an epoch."""
    backbone = save_random_clip(folder / "teacher.safetensors", seed=3, embed=192, vision=192, text=128)
    needed = ["TRAINER.PROMPTSRC.PREC", "fp32", "OPTIM.MAX_EPOCH", 1, "TRAINER.PROMPTSRC.GPA_MEAN", 1]
    make_trainer(folder, "PromptSRC", "promptsrc", *needed, *options, backbone=backbone).train()
    checkpoint = str(folder / "out/VLPromptLearner/model.pth.tar-1")
    return ["TRAINER.PROMPTKD.TEACHER_NAME", backbone, "TRAINER.PROMPTKD.TEACHER_CHECKPOINT", checkpoint]


def batch_of(trainer):
    """One training batch of every image, always in the same order: {img, label}."""
    items = [trainer.train_loader_x.dataset[i] for i in range(len(trainer.train_loader_x.dataset))]
    return {
        "img": torch.stack([item["img"] for item in items]),
        "label": torch.tensor([item["label"] for item in items]),
    }


def losses_over(trainer, steps, part="loss"):
    """A part of the loss in each of `steps` steps on the same batch."""
    trainer.set_model_mode("train")
    trainer.num_batches, batch = steps + 1, batch_of(trainer)
    losses = []
    for trainer.batch_idx in range(steps):
        losses.append(trainer.forward_backward(batch)[part])
    return losses
