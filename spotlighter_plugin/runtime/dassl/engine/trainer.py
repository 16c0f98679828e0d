"""The training loop, in the small methods that trainers override."""

import datetime
import math
import os
import time

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from spotlighter_plugin import ranks

from ..data import DataManager
from ..evaluation import build_evaluator
from ..modeling import build_backbone, build_head
from ..optim import build_lr_scheduler, build_optimizer
from ..utils import (
    AverageMeter,
    MetricMeter,
    count_num_param,
    load_pretrained_weights,
    tolist_if_not,
)
from . import checkpoints

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # TensorBoard is optional: without it the log is all there is
    SummaryWriter = None


class SimpleNet(nn.Module):
    """A registered backbone, a head if MODEL.HEAD names one, and a linear classifier."""

    def __init__(self, cfg, model_cfg, num_classes, **kwargs):
        super().__init__()
        body, head = model_cfg.BACKBONE, model_cfg.HEAD
        self.backbone = build_backbone(body.NAME, cfg.VERBOSE, pretrained=body.PRETRAINED, **kwargs)
        self.fdim = self.backbone.out_features
        self.head = None
        if head.NAME and head.HIDDEN_LAYERS:
            options = {"activation": head.ACTIVATION, "bn": head.BN, "dropout": head.DROPOUT, **kwargs}
            self.head = build_head(
                head.NAME, cfg.VERBOSE, in_features=self.fdim, hidden_layers=head.HIDDEN_LAYERS, **options
            )
            self.fdim = self.head.out_features
        self.classifier = nn.Linear(self.fdim, num_classes) if num_classes > 0 else None

    def forward(self, x, return_feature=False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        features = self.backbone(x)
        if self.head is not None:
            features = self.head(features)
        if self.classifier is None:
            return features
        logits = self.classifier(features)
        return (logits, features) if return_feature else logits


class TrainerBase:
    """Tables of models with their optimizers and schedules, and the epoch loop over them."""

    save_model = checkpoints.save_model
    load_model = checkpoints.load_model
    resume_model_if_exist = checkpoints.resume_model_if_exist

    def __init__(self):
        self._models, self._optims, self._scheds = {}, {}, {}
        self._writer = None
        self.epoch = self.batch_idx = 0

    # -- models ------------------------------------------------------------------------------------------------
    def register_model(self, name="model", model=None, optim=None, sched=None) -> None:
        """Make `model` known for train/eval mode, saving and loading; its folder in the output is `name`."""
        if "_models" not in self.__dict__:
            raise AttributeError("call super().__init__() before register_model()")
        if name in self._models:
            raise ValueError(f"a model named {name!r} is registered already")
        self._models[name], self._optims[name], self._scheds[name] = model, optim, sched

    def get_model_names(self, names=None) -> list[str]:
        if names is None:
            return list(self._models)
        names = tolist_if_not(names)
        if unknown := [name for name in names if name not in self._models]:
            raise ValueError(f"no model named {unknown}; registered are {list(self._models)}")
        return names

    def set_model_mode(self, mode="train", names=None) -> None:
        if mode not in ("train", "test", "eval"):
            raise KeyError(f"mode {mode!r} is not train, test or eval")
        for name in self.get_model_names(names):
            self._models[name].train(mode == "train")

    # -- one step ----------------------------------------------------------------------------------------------
    def detect_anomaly(self, loss) -> None:
        """Raise FloatingPointError, naming the place, unless the loss is finite."""
        if not torch.isfinite(loss).all():
            raise FloatingPointError(f"the loss is {loss.detach().mean().item()} in {self._place()}")

    def _place(self):
        return f"epoch [{self.epoch + 1}/{self.max_epoch}] batch [{self.batch_idx + 1}/{self.num_batches}]"

    def model_zero_grad(self, names=None) -> None:
        for name in self.get_model_names(names):
            if self._optims[name] is not None:
                self._optims[name].zero_grad()

    def model_backward(self, loss) -> None:
        self.detect_anomaly(loss)
        loss.backward()

    def model_update(self, names=None) -> None:
        for name in self.get_model_names(names):
            if self._optims[name] is not None:
                self._optims[name].step()

    def model_backward_and_update(self, loss, names=None) -> None:
        self.model_zero_grad(names)
        self.model_backward(loss)
        self.model_update(names)

    def update_lr(self, names=None) -> None:
        for name in self.get_model_names(names):
            if self._scheds[name] is not None:
                self._scheds[name].step()

    # -- TensorBoard, where it is installed --------------------------------------------------------------------
    def init_writer(self, log_dir) -> None:
        if self._writer is None and SummaryWriter is not None and ranks.is_first():
            print(f"Initialize tensorboard (log_dir={log_dir})")
            self._writer = SummaryWriter(log_dir=log_dir)

    def close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def write_scalar(self, tag, scalar_value, global_step=None) -> None:
        if self._writer is not None:
            self._writer.add_scalar(tag, scalar_value, global_step)

    # -- the loop ----------------------------------------------------------------------------------------------
    def train(self, start_epoch, max_epoch) -> None:
        self.start_epoch, self.max_epoch = start_epoch, max_epoch
        self.before_train()  # may move start_epoch when it resumes
        for self.epoch in range(self.start_epoch, max_epoch):  # noqa: B020
            self.before_epoch()
            self.run_epoch()
            self.after_epoch()
        self.after_train()

    def before_train(self) -> None:
        pass

    def after_train(self) -> None:
        pass

    def before_epoch(self) -> None:
        pass

    def after_epoch(self) -> None:
        pass

    def run_epoch(self) -> None:
        raise NotImplementedError

    def test(self) -> float:
        raise NotImplementedError

    def parse_batch_train(self, batch) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    def parse_batch_test(self, batch) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    def forward_backward(self, batch) -> dict[str, float]:
        raise NotImplementedError

    def model_inference(self, input) -> torch.Tensor:
        raise NotImplementedError


class SimpleTrainer(TrainerBase):
    """Builds data, model and evaluator from the configuration; resumes, saves and tests around the loop."""

    def __init__(self, cfg):
        super().__init__()
        self.check_cfg(cfg)
        self.device = torch.device("cuda" if torch.cuda.is_available() and cfg.USE_CUDA else "cpu")
        self.start_epoch = 0
        self.max_epoch = cfg.OPTIM.MAX_EPOCH
        self.output_dir = cfg.OUTPUT_DIR
        self.cfg = cfg
        self.build_data_loader()
        self.build_model()
        self.evaluator = build_evaluator(cfg, lab2cname=self.lab2cname)
        self.best_result = -np.inf

    def check_cfg(self, cfg) -> None:
        """For a trainer to raise ValueError on settings that it cannot work with."""

    def build_data_loader(self) -> None:
        self.dm = dm = DataManager(self.cfg)
        self.train_loader_x, self.train_loader_u = dm.train_loader_x, dm.train_loader_u
        self.val_loader, self.test_loader = dm.val_loader, dm.test_loader
        self.num_classes, self.num_source_domains, self.lab2cname = dm.num_classes, dm.num_source_domains, dm.lab2cname

    def build_model(self) -> None:
        cfg = self.cfg
        print("Building model")
        self.model = SimpleNet(cfg, cfg.MODEL, self.num_classes)
        if cfg.MODEL.INIT_WEIGHTS:
            load_pretrained_weights(self.model, cfg.MODEL.INIT_WEIGHTS)
        self.model.to(self.device)
        print(f"# params: {count_num_param(self.model):,}")
        self.optim = build_optimizer(self.model, cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model("model", self.model, self.optim, self.sched)

    def train(self) -> None:
        super().train(self.start_epoch, self.max_epoch)

    def before_train(self) -> None:
        self.start_epoch = self.resume_model_if_exist(self.cfg.RESUME or self.output_dir)
        self.init_writer(os.path.join(self.output_dir, "tensorboard"))
        self.time_start = time.time()

    def after_epoch(self) -> None:
        checkpoints.after_epoch(self)

    def after_train(self) -> None:
        print("Finish training")
        if not self.cfg.TEST.NO_TEST:
            if self.cfg.TEST.FINAL_MODEL == "best_val":
                print("Deploy the model with the best val performance")
                self.load_model(self.output_dir)
            else:
                print("Deploy the last-epoch model")
            self.test()
        print(f"Elapsed: {datetime.timedelta(seconds=round(time.time() - self.time_start))}")
        self.close_writer()

    @torch.no_grad()
    def test(self, split=None) -> float:
        """Evaluate on "val" or "test" (default TEST.SPLIT; "test" where there is no val); returns the accuracy."""
        self.set_model_mode("eval")
        self.evaluator.reset()
        split = split or self.cfg.TEST.SPLIT
        if split != "val" or self.val_loader is None:
            split = "test"
        print(f"Evaluate on the *{split}* set")
        loader = self.val_loader if split == "val" else self.test_loader
        for batch in tqdm(loader, disable=None if ranks.is_first() else True):  # None: on a terminal only
            images, labels = self.parse_batch_test(batch)
            self.evaluator.process(self.model_inference(images), labels)
        results = self.evaluator.evaluate()
        for name, value in results.items():
            self.write_scalar(f"{split}/{name}", value, self.epoch)
        return next(iter(results.values()))

    def model_inference(self, input) -> torch.Tensor:
        return self.model(input)

    def parse_batch_test(self, batch) -> tuple[torch.Tensor, ...]:
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def get_current_lr(self, names=None) -> float:
        return self._optims[self.get_model_names(names)[0]].param_groups[0]["lr"]

    def _run_batches(self, batches):
        """One epoch: forward_backward(*batch) for each batch, with the log lines. Sets batch_idx."""
        self.set_model_mode("train")
        losses, batch_time, data_time = MetricMeter(), AverageMeter(), AverageMeter()
        self.batch_idx, end = -1, time.time()
        for self.batch_idx, batch in enumerate(batches):
            data_time.update(time.time() - end)
            summary = ranks.mean_of(self.forward_backward(*batch))
            batch_time.update(time.time() - end)
            losses.update(summary)
            self._check_finite(summary)
            self._log(losses, batch_time, data_time)
            end = time.time()
        if self.batch_idx + 1 < self.num_batches:
            self.update_lr()  # trainers step the schedule on the last batch, which was lost to unreadable images

    def _check_finite(self, summary):
        """Mixed-precision trainers do not pass model_backward(): catch their NaN here."""
        for name, value in (summary or {}).items():
            if name.startswith("loss") and not math.isfinite(value):
                raise FloatingPointError(f"{name} is {float(value)} in {self._place()}")

    def _log(self, losses, batch_time, data_time):
        every, done = self.cfg.TRAIN.PRINT_FREQ, self.batch_idx + 1
        if done % every == 0 or self.num_batches < every:
            left = self.num_batches - done + (self.max_epoch - self.epoch - 1) * self.num_batches
            eta = datetime.timedelta(seconds=int(batch_time.avg * left))
            print(
                f"{self._place()} time {batch_time.val:.3f} ({batch_time.avg:.3f}) "
                f"data {data_time.val:.3f} ({data_time.avg:.3f}) {losses} lr {self.get_current_lr():.4e} eta {eta}"
            )
        step = self.epoch * self.num_batches + self.batch_idx
        for name, meter in losses.meters.items():
            self.write_scalar(f"train/{name}", meter.avg, step)
        self.write_scalar("train/lr", self.get_current_lr(), step)


class TrainerX(SimpleTrainer):
    """Learns from labelled images alone."""

    def run_epoch(self) -> None:
        self.num_batches = len(self.train_loader_x)
        self._run_batches((batch,) for batch in self.train_loader_x)

    def parse_batch_train(self, batch) -> tuple[torch.Tensor, ...]:
        return _one_view(batch).to(self.device), batch["label"].to(self.device), batch["domain"].to(self.device)


class TrainerXU(SimpleTrainer):
    """Learns from labelled and unlabelled batches side by side; TRAIN.COUNT_ITER says which loader counts."""

    def run_epoch(self) -> None:
        if ranks.world() > 1:
            raise ValueError(f"{type(self).__name__} learns from two kinds of batches side by side: in one process")
        sizes = {"train_x": len(self.train_loader_x), "train_u": len(self.train_loader_u)}
        sizes["smaller_one"] = min(sizes.values())
        if self.cfg.TRAIN.COUNT_ITER not in sizes:
            raise ValueError(f"TRAIN.COUNT_ITER {self.cfg.TRAIN.COUNT_ITER!r} is not one of {sorted(sizes)}")
        self.num_batches = sizes[self.cfg.TRAIN.COUNT_ITER]
        x, u = _endless(self.train_loader_x), _endless(self.train_loader_u)
        self._run_batches((next(x), next(u)) for _ in range(self.num_batches))

    def parse_batch_train(self, batch_x, batch_u) -> tuple[torch.Tensor, ...]:
        return _one_view(batch_x).to(self.device), batch_x["label"].to(self.device), _one_view(batch_u).to(self.device)


def _one_view(batch) -> torch.Tensor:
    """A batch's images (B, 3, h, w); a trainer that compares several views of a picture takes them itself."""
    if isinstance(batch["img"], list):
        raise ValueError(f"DATALOADER.K_TRANSFORMS is {len(batch['img'])}: this trainer takes 1 view of a picture")
    return batch["img"]


def _endless(loader):
    while True:
        yield from loader
