"""What the host trainers share: backbone and precision from the options, one training step, loading a checkpoint."""

from __future__ import annotations

import os.path as osp

import torch
import torch.nn.functional as F
from dassl.engine import TrainerX
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import load_checkpoint, load_pretrained_weights

from datasets.templates import prompt
from spotlighter_plugin.runtime.dassl.utils.checkpoint import load_weights
from spotlighter_plugin.towers.clip import (
    PRECISIONS,
    apply_precision,
    load_clip,
    mixed_precision,
    require_vision_transformer,
)
from spotlighter_plugin.towers.prompts import normalize


def load_backbone(cfg, precision="fp32", name=None):
    """The CLIP that MODEL.BACKBONE.NAME (or `name`) names, in the given precision, checked against INPUT.SIZE."""
    name = name or cfg.MODEL.BACKBONE.NAME
    print(f"Loading CLIP (backbone: {name})")
    clip_model = apply_precision(load_clip(name), precision)
    size, needed = tuple(cfg.INPUT.SIZE), clip_model.visual.input_resolution
    if size != (needed, needed):
        raise ValueError(f'INPUT.SIZE {size} does not suit backbone {name}: set INPUT.SIZE "({needed}, {needed})"')
    return clip_model


def hand_written(cfg, class_names):
    """Each class in its data set's hand-written prompt: a list of C texts."""
    return [prompt(cfg.DATASET.NAME).format(name.replace("_", " ")) for name in class_names]


def held_near(model, frozen, weight, images, labels):
    """Cross entropy and weight · (1 - mean cosine of the texts with frozen ones (C, d)): the loss, and what to log."""
    image, text = normalize(model.encode_image(images)), model.text_features()  # (B, d), (C, d)
    logits = model.logit_scale.exp() * image @ text.t()  # (B, C)
    loss = F.cross_entropy(logits, labels) + weight * (1 - F.cosine_similarity(text, frozen).mean())
    return loss, {"acc": compute_accuracy(logits, labels)[0].item()}


class HostTrainer(TrainerX):
    """A prompt-tuning trainer. A host names its options and its checkpoint folder, makes its model and its loss."""

    options = ""  # name of its node under cfg.TRAINER
    checkpoint = "prompt_learner"  # upstream's name of the registered model
    needs_vision_transformer = False

    def make_model(self, clip_model, class_names):
        """Return the host's model with requires_grad set on exactly the parameters it trains."""
        raise NotImplementedError

    def registered(self, model):
        """The part of the model that is saved and given to the optimizer."""
        return model

    def objective(self, images, labels):
        """Return the loss and a dict of numbers to log."""
        raise NotImplementedError

    @property
    def host_options(self):
        return self.cfg.TRAINER[self.options]

    def check_cfg(self, cfg):
        precision = cfg.TRAINER[self.options].PREC
        if precision not in PRECISIONS:
            raise ValueError(
                f"TRAINER.{self.options}.PREC {precision!r} is unknown: choose one of {', '.join(PRECISIONS)}"
            )
        if cfg.DATALOADER.K_TRANSFORMS != 1:
            views = cfg.DATALOADER.K_TRANSFORMS
            raise ValueError(f"DATALOADER.K_TRANSFORMS is {views}: hosts take 1 view of a picture")

    def build_model(self):
        cfg, precision = self.cfg, self.host_options.PREC
        clip_model = load_backbone(cfg, precision)
        if self.needs_vision_transformer:
            require_vision_transformer(clip_model, cfg.MODEL.BACKBONE.NAME)
        clip_model.requires_grad_(False)
        self.model = self.make_model(clip_model, self.dm.dataset.classnames).to(self.device)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        print(f"Trainable parameters: {trained:,}")

        part = self.registered(self.model)
        if cfg.MODEL.INIT_WEIGHTS:
            load_pretrained_weights(part, cfg.MODEL.INIT_WEIGHTS)
        self.optim = build_optimizer([p for p in part.parameters() if p.requires_grad], cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model(self.checkpoint, part, self.optim, self.sched)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "amp" and self.device.type == "cuda")

    def forward_backward(self, batch):
        images, labels = self.parse_batch_train(batch)
        with mixed_precision(self.device, self.host_options.PREC):
            loss, summary = self.objective(images, labels)
        self.detect_anomaly(loss)
        self.optim.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optim)
        self.scaler.update()
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss": loss.item(), **summary}

    def parse_batch_train(self, batch):
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def load_model(self, directory, epoch=None):
        if not directory:
            print("No folder to load from was given (--model-dir): the model stays as it is")
            return
        file_name = "model-best.pth.tar" if epoch is None else f"model.pth.tar-{epoch}"
        path = osp.join(directory, self.checkpoint, file_name)
        if not osp.exists(path):
            raise FileNotFoundError(f'Model not found at "{path}": set --model-dir and --load-epoch')
        content = load_checkpoint(path)
        load_weights(self._models[self.checkpoint], content["state_dict"], path)
        print(f'Loaded {self.checkpoint} from "{path}" (epoch = {content["epoch"]})')
