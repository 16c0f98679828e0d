"""A data set of coloured squares and a linear trainer: small enough to train in a blink, on either Dassl."""

from pathlib import Path

import numpy as np
import torch
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.engine import TRAINER_REGISTRY, TrainerX, TrainerXU
from dassl.metrics import compute_accuracy
from dassl.modeling import BACKBONE_REGISTRY, Backbone
from dassl.optim import build_lr_scheduler, build_optimizer
from PIL import Image

from spotlighter_plugin.workbench.training.train import run

CLASSES = ("red", "green", "blue")
PER_CLASS = 8


def draw_squares(root):
    """Write PER_CLASS noisy 16-pixel squares a class under `root`/squares, half as many under `root`/validation."""
    noise = np.random.default_rng(0)
    for folder, label, number in [
        *(("squares", label, number) for label in range(len(CLASSES)) for number in range(PER_CLASS)),
        *(("validation", label, number) for label in range(len(CLASSES)) for number in range(PER_CLASS // 2)),
    ]:
        pixels = noise.integers(0, 120, (16, 16, 3), dtype=np.uint8)
        pixels[..., label] += 80
        path = Path(root, folder, CLASSES[label], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


@DATASET_REGISTRY.register()
class Squares(DatasetBase):
    """Of the folders squares and validation. `lends_test`: val is the test images; `repeats`: each image so often."""

    lends_test, repeats = False, 1

    def __init__(self, cfg):
        items, validation = (
            [
                Datum(str(path), label, classname=name)
                for label, name in enumerate(CLASSES)
                for path in sorted(Path(cfg.DATASET.ROOT, folder, name).glob("*.png"))
            ]
            for folder in ("squares", "validation")
        )
        train = self.generate_fewshot_dataset(items * self.repeats, num_shots=cfg.DATASET.NUM_SHOTS)
        unlabelled = items if cfg.DATASET.ALL_AS_UNLABELED else None
        super().__init__(train_x=train, train_u=unlabelled, val=items if self.lends_test else validation, test=items)


@TRAINER_REGISTRY.register()
class Linear(TrainerX):
    """A linear layer with dropout, so that training draws random numbers. BREAK_AT makes the loss NaN in an epoch."""

    break_at = None

    def build_model(self):
        size = 3 * self.cfg.INPUT.SIZE[0] * self.cfg.INPUT.SIZE[1]
        self.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.3), torch.nn.Linear(size, 3))
        self.model.to(self.device)
        self.optim = build_optimizer(self.model, self.cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, self.cfg.OPTIM)
        self.register_model("linear", self.model, self.optim, self.sched)

    def forward_backward(self, batch):
        images, labels, _ = self.parse_batch_train(batch)
        output = self.model(images)
        loss = torch.nn.functional.cross_entropy(output, labels)
        if self.epoch + 1 == self.break_at and self.batch_idx == 1:
            loss = loss * float("nan")
        self.model_backward_and_update(loss)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss": loss.item(), "acc": compute_accuracy(output, labels)[0].item()}


@TRAINER_REGISTRY.register()
class LinearXU(TrainerXU):
    """The same without dropout, with the mean confidence on unlabelled images as a second loss."""

    build_model = Linear.build_model

    def forward_backward(self, batch_x, batch_u):
        images, labels, unlabelled = self.parse_batch_train(batch_x, batch_u)
        confidence = self.model(unlabelled).softmax(dim=1).amax(dim=1).mean()
        loss = torch.nn.functional.cross_entropy(self.model(images), labels) - 0.01 * confidence
        self.model_backward_and_update(loss)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss": loss.item()}


@BACKBONE_REGISTRY.register()
class Flat(Backbone):
    def __init__(self, pretrained=True, **kwargs):
        super().__init__()
        self._out_features = 3 * 16 * 16

    def forward(self, images):
        return images.flatten(1)


@TRAINER_REGISTRY.register()
class Plain(TrainerX):
    """Dassl's own model: a backbone and a classifier."""

    def forward_backward(self, batch):
        images, labels, _ = self.parse_batch_train(batch)
        loss = torch.nn.functional.cross_entropy(self.model(images), labels)
        self.model_backward_and_update(loss)
        return {"loss": loss.item()}


def squares_args(root, output, *options):
    """Command line of a run on the squares."""
    config = Path(root, "squares.yaml")
    config.write_text(
        "DATASET:\n  NAME: Squares\nINPUT:\n  SIZE: (16, 16)\n  TRANSFORMS: ['random_flip', 'normalize']\n"
        "OPTIM:\n  NAME: sgd\n  LR: 0.01\n  MAX_EPOCH: 4\n  LR_SCHEDULER: cosine\n  WARMUP_EPOCH: 1\n"
        "  WARMUP_TYPE: constant\nDATALOADER:\n  NUM_WORKERS: 0\n  TRAIN_X:\n    BATCH_SIZE: 5\n"
        "TRAIN:\n  CHECKPOINT_FREQ: 1\n  PRINT_FREQ: 1\n"
    )
    flags = ["--trainer", "Linear", "--dataset-config-file", str(config), "--root", str(root)]
    return [*flags, "--output-dir", str(output), *options]


def train_squares(root, output, *options):
    return run(squares_args(root, output, *options))


def weights(done):
    """The trained tensors of a Run, by name."""
    return {name: value.clone() for name, value in done.trainer.model.state_dict().items()}
