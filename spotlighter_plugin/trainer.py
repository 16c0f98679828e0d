"""SpotlighterTrainerMixin: the plug-in in a Dassl trainer, whatever the host."""

import io
import os
import os.path as osp
import random
import re
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module

import torch
from dassl.engine import TrainerX
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import load_checkpoint
from torch import nn
from torch.utils.data import DataLoader

from . import errors, ranks
from .config import from_cfg
from .hosts.base import HostAdapter
from .hosts.generic import GenericAdapter
from .method.invariance import undisturbed
from .towers import GENERAL
from .towers.clip import encode_prompts, load_clip, mixed_precision
from .wrapper import SpotlighterWrapper

NO_CHECK = "SPOTLIGHTER_NO_CHECK"  # an environment variable: attach without the check that it changes nothing


class SpotlighterTrainerMixin:
    """Put in front of a host's trainer: ``class CoOpSpotlighter(SpotlighterTrainerMixin, CoOp)``.

    The host builds its model, its optimizer and its checkpoints as ever; the plug-in's own state is one more registered
    model, ``spotlighter``, with an optimizer and a schedule of its own after the same options.

    Attributes:
        adapter: the class of the host's adapter.
    """

    adapter = None
    folder = "spotlighter"
    is_remembered = False  # whether the memory holds the shots as the model sees them at present

    def check_cfg(self, cfg) -> None:
        if errors.started_together() and ranks.world() == 1:
            raise ValueError("torchrun starts Spotlighter's own train.py; a fork's takes several GPUs by DataParallel")
        super().check_cfg(cfg)
        from_cfg(cfg)

    def make_adapter(self, host, class_names) -> HostAdapter:
        """The adapter of this run; a host whose adapter needs more than its model overrides this."""
        return self.adapter(host, class_names)

    def wrapped(self) -> SpotlighterWrapper:
        """A wrapper around the host that has been built."""
        host = self.model.module if isinstance(self.model, nn.DataParallel) else self.model
        class_names, check = list(self.dm.dataset.classnames), NO_CHECK not in os.environ
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapter = self.make_adapter(host, class_names)
            wrapper = SpotlighterWrapper(host, from_cfg(self.cfg), adapter, class_names, check)
        print(*(f"Note: {each.message}\n" for each in said), sep="", end="")
        if self.adapter.hand_written_text:
            adapter.set_templates(cache(lambda: template_texts(self.cfg, class_names, self.device)))
        if wrapper.invariance is not None:
            print(f"With every token kept the host's logits differ by {wrapper.invariance:.1e} of their scale")
        return wrapper.to(self.device)

    def build_model(self) -> None:
        super().build_model()
        self.model = self.spotlighter = self.wrapped()
        config, added = self.model.config, self.model.extra_parameter_count()
        print(f"Spotlighter adds {added:,} trainable parameters (mapping: {config.mapping})")
        optim = sched = None
        if added:
            options = self.cfg.OPTIM.clone()
            options.defrost()
            options.LR = options.LR * config.lr_multiplier
            optim = build_optimizer(self.model.plugin, options)
            sched = build_lr_scheduler(optim, options)
        self.register_model(self.folder, self.model.plugin, optim, sched)

    def before_train(self) -> None:
        if self.adapter.hand_written_text and {"reg_text", "kl_visual"} & set(self.model.config.losses):
            self.model.adapter.set_frozen_text(hand_written_texts(self.cfg, self.model.class_names, self.device))
        super().before_train()

    def forward_backward(self, batch) -> dict[str, float]:
        images, labels = self.parse_batch_train(batch)[:2]
        with mixed_precision(self.device, self._precision()):
            output = self.model(images, labels)
        logits = output.pop("logits")
        self.detect_anomaly(output["loss"])
        self._update(output["loss"])
        if self.batch_idx == 0 and self.epoch == self.start_epoch and self.model.unreached:
            unreached, config = self.model.unreached, self.model.config
            print(f"Left out, because nothing that is trained changes them: {', '.join(sorted(unreached))}")
            idle = [option for option in config.idle(unreached) if option not in config.idle()]
            if idle:
                print(f"Note: {', '.join(idle)}: nothing reads it here, for the same reason")
        if (self.batch_idx + 1) == self.num_batches:
            self.update_lr()
        summary = {name: value.item() for name, value in output.items()}
        return {**summary, "acc": compute_accuracy(logits, labels)[0].item()}

    def model_inference(self, images) -> torch.Tensor:
        with mixed_precision(self.device, self._precision()):
            return self.model(images)

    def after_epoch(self) -> None:
        test = self.cfg.TEST
        if test.FINAL_MODEL == "best_val" and not test.NO_TEST:
            self._remember()  # the memory counts where models are compared
            self.is_remembered = True
        super().after_epoch()
        self.is_remembered = False

    def save_model(self, epoch, directory, *args, **kwargs) -> None:
        if not self.is_remembered:
            self._remember()
        super().save_model(epoch, directory, *args, **kwargs)

    def load_model(self, directory, epoch=None) -> None:
        """Load the host's checkpoint the host's way, and the plug-in's beside it if the folder has one."""
        with self._unseen() as plugin:
            super().load_model(directory, epoch)
        if not directory:
            return
        file_name = "model-best.pth.tar" if epoch is None else f"model.pth.tar-{epoch}"
        path = osp.join(directory, self.folder, file_name)
        if not osp.isdir(osp.dirname(path)):
            self._attach(directory, epoch)
            return
        if not osp.exists(path):
            raise FileNotFoundError(f'Model not found at "{path}": set --model-dir and --load-epoch')
        checkpoint = load_checkpoint(path)
        plugin.load_state_dict(checkpoint["state_dict"])
        if plugin.memory is not None and not plugin.memory.is_ready:
            print(f"Note: {path} was saved to go on from, in the middle of training: it remembers no shots")
        print(f'Loaded {self.folder} from "{path}" (epoch = {checkpoint["epoch"]})')

    @contextmanager
    def _unseen(self):
        """The plug-in's state is none of the registered models for a while: the host sees to its own."""
        plugin = self._models.pop(self.folder)
        try:
            yield plugin
        finally:
            self._models[self.folder] = plugin

    def _attach(self, directory, epoch):
        """Beside a host that was trained without the plug-in: learn from the shots that it was trained on, if this run
        has them, and save both in the output folder, from where they are loaded for other classes."""
        dataset, theirs = self.cfg.DATASET, data_of(directory)
        if theirs != (dataset.NAME, str(dataset.get("SUBSAMPLE_CLASSES", "all"))):
            trained_on = f"({theirs[0]}, {theirs[1]} classes)" if theirs else "(no log.txt there says what)"
            print(
                f"No Spotlighter state in {directory}: nothing is remembered. Evaluate it on what it was trained on "
                f"{trained_on}, with an --output-dir, and take that as --model-dir"
            )
            return
        print(f"No Spotlighter state in {directory}: attached to it without training")
        self._remember()
        folder = self.cfg.OUTPUT_DIR
        if osp.realpath(folder) == osp.realpath(directory):
            return
        self.is_remembered = True
        if epoch is None:
            self.save_model(0, folder, model_name="model-best.pth.tar")
        else:
            self.save_model(epoch - 1, folder)
        self.is_remembered = False
        print(f"Saved in {folder}: as --model-dir it serves other classes, too")

    def shot_loader(self) -> DataLoader:
        """The training images, once each and without augmentation; of very many some, twice what the memory holds."""
        from dassl.data.data_manager import build_data_loader
        from dassl.data.transforms import build_transform

        transform, size = build_transform(self.cfg, is_train=False), self.cfg.DATALOADER.TEST.BATCH_SIZE
        shots, most = (
            self.dm.dataset.train_x,
            2 * self.spotlighter.config.match_shots * len(self.spotlighter.class_names),
        )
        if len(shots) > most:  # PromptKD's unlabelled images, or NUM_SHOTS -1
            shots = random.Random(0).sample(shots, most)
        return build_data_loader(self.cfg, "SequentialSampler", shots, size, tfm=transform, is_train=False)

    def _remember(self):
        """Let the memory learn from the shots and weigh itself; the checkpoint holds what came of it."""
        if not self.spotlighter.config.prototype_logits:
            return
        with torch.random.fork_rng(), mixed_precision(self.device, self._precision()):
            file = self.spotlighter.adapter.assignment_labels
            batches = map(self.parse_batch_test, self.shot_loader())
            count = self.spotlighter.remember((images, file(images, labels)) for images, labels in batches)
        if count:
            print(f"Memory of {count} shots: {self.spotlighter.plugin.memory.choice.describe()}")

    def _precision(self):
        """The host's PREC: fp16, fp32 or amp."""
        nodes = (self.adapter.name.upper(), "COOP")  # CLIPFit's fork has its options under COOP
        return next((self.cfg.TRAINER[node].PREC for node in nodes if node in self.cfg.TRAINER), "fp32")

    def _update(self, loss):
        scaler = getattr(self, "scaler", None)
        if scaler is None or not scaler.is_enabled():
            self.model_backward_and_update(loss)
            return
        self.model_zero_grad()
        scaler.scale(loss).backward()
        for optim in self._optims.values():
            if optim is not None and any(p.grad is not None for group in optim.param_groups for p in group["params"]):
                scaler.step(optim)
        scaler.update()


class SpotlighterAttachedMixin(SpotlighterTrainerMixin):
    """Put in front of any trainer with an image encoder: ``class TCPSpotlighter(SpotlighterAttachedMixin, TCP)``.

    The host is built, trained, saved and loaded by its own code, and Spotlighter is attached to the result: it keeps
    the host's logits, computed from the tokens that matter, and adds what the memory of the shots says.
    """

    adapter = GenericAdapter

    def __init__(self, cfg):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.TRAINER.NAME = type(self).__name__.removesuffix("Spotlighter")  # hosts look at it
        cfg.freeze()
        super().__init__(cfg)

    def make_adapter(self, host, class_names) -> HostAdapter:
        return self.adapter(host, class_names, self._asked)

    def build_model(self) -> None:
        super(SpotlighterTrainerMixin, self).build_model()
        with undisturbed(self._hosts_models()):
            self.spotlighter = self.wrapped()
        self.register_model(self.folder, self.spotlighter.plugin)
        print(f"Spotlighter is attached to {self.cfg.TRAINER.NAME}, which is trained by its own step")

    def before_train(self) -> None:
        super(SpotlighterTrainerMixin, self).before_train()

    def forward_backward(self, batch) -> dict[str, float]:
        with self._unseen():
            return super(SpotlighterTrainerMixin, self).forward_backward(batch)

    def model_inference(self, images) -> torch.Tensor:
        return self.spotlighter(images)

    def test(self, split=None) -> float:
        return TrainerX.test(self, split)  # a host's own asks its model

    def _asked(self, images):
        """What the host's own evaluation says of images: of a test that it brings, what an evaluator is given."""
        host = super(SpotlighterTrainerMixin, self)
        if host.test.__func__ is TrainerX.test:
            return host.model_inference(images)
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        one = [{"img": images, "label": labels}]
        evaluator = _Listens()
        told = {"evaluator": evaluator, "val_loader": one, "test_loader": one, "set_model_mode": lambda *mode: None}
        told["model_inference"] = host.model_inference
        before = {name: vars(self)[name] for name in told if name in vars(self)}
        vars(self).update(told)
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # a bar for each batch
                host.test()
        except _Heard:
            return evaluator.output
        finally:
            for name in told:
                del vars(self)[name]
            vars(self).update(before)
        raise ValueError(f"{self.cfg.TRAINER.NAME}.test hands nothing to its evaluator: nobody knows what it says")

    def _hosts_models(self):
        models = [model for name, model in self._models.items() if name != self.folder]
        return nn.ModuleList([self.model, *models])

    def _remember(self):
        with undisturbed(self._hosts_models()):  # hosts keep texts in evaluation, and forget none in training
            super()._remember()

    def _precision(self):
        return "fp32"  # the host's own forward sees to its own


class _Heard(Exception):
    """The evaluator has been given what it is there for."""


class _Listens:
    """An evaluator that keeps what it is given, and ends the test that gives it."""

    def reset(self):
        pass

    def process(self, output, label):
        self.output = output
        raise _Heard


def data_of(directory: str) -> tuple[str, str] | None:
    """Data set and classes (all, base or new) that a run was trained on, by its log.txt, if it has one."""
    path = osp.join(directory, "log.txt")
    if not osp.isfile(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        settings = re.search(r"^DATASET:\n((?:  .*\n)+)", file.read(), re.MULTILINE)
    given = dict(re.findall(r"^  (\w+): (.*)$", settings[1], re.MULTILINE)) if settings else {}
    return (given["NAME"], given.get("SUBSAMPLE_CLASSES", "all")) if "NAME" in given else None


def hand_written_texts(cfg, class_names: list[str], device: torch.device) -> torch.Tensor:
    """The frozen CLIP's embeddings t⁰ of the data set's hand-written prompts, normalized: (C, d)."""
    clip_model = load_clip(cfg.MODEL.BACKBONE.NAME).to(device)
    return _encode(clip_model, _hand_written_prompt(cfg.DATASET.NAME), class_names)


def template_texts(cfg, class_names: list[str], device: torch.device) -> torch.Tensor:
    """The mean over the data set's ensemble of templates, through the frozen CLIP, normalized: (C, d)."""
    try:
        templates = import_module("datasets.templates").ensemble(cfg.DATASET.NAME)
    except (ImportError, AttributeError):  # in a fork
        templates = (_hand_written_prompt(cfg.DATASET.NAME), *GENERAL)
    clip_model = load_clip(cfg.MODEL.BACKBONE.NAME).to(device)
    total = sum(_encode(clip_model, template, class_names) for template in templates)
    return torch.nn.functional.normalize(total, dim=-1)


def _encode(clip_model, template: str, class_names: list[str]) -> torch.Tensor:
    return encode_prompts(clip_model, [template.format(name.replace("_", " ")) for name in class_names])  # (C, d)


def _hand_written_prompt(dataset: str) -> str:
    """The data set's hand-written prompt, from this repository's table or a fork's; a plain one for other data sets."""
    for module, table in (("datasets.templates", "TEMPLATES"), ("trainers.zsclip", "CUSTOM_TEMPLATES")):
        try:
            templates = getattr(import_module(module), table)
        except (ImportError, AttributeError):
            continue
        if dataset in templates:
            return templates[dataset]
    return "a photo of a {}."
