"""PromptKD: a prompted student distilled from a larger teacher on unlabelled images (Li et al., CVPR 2024).

The teacher is a CLIP tuned by PromptSRC. Its text embeddings classify for both; the student's image embedding is
projected to the teacher's width.
"""

import torch
from dassl.engine import TRAINER_REGISTRY
from dassl.metrics import compute_accuracy
from dassl.utils import load_checkpoint
from torch import nn
from yacs.config import CfgNode

from spotlighter_plugin import ranks
from spotlighter_plugin.hosts.promptkd import classes_of_split, distillation_loss
from spotlighter_plugin.runtime.dassl.utils.checkpoint import load_weights
from spotlighter_plugin.towers.clip import apply_precision, require_vision_transformer
from spotlighter_plugin.towers.deep_prompts import checked_depth, own_vision_prompts
from spotlighter_plugin.towers.prompts import CLIPClassifier

from . import promptsrc
from .host import HostTrainer, load_backbone

MODALS = ("base2novel", "cross")


def extend_cfg(cfg):
    """Add the options of PromptKD."""
    cfg.TRAINER.MODAL = "base2novel"  # base2novel: val has the base classes, test the others; cross: all in both
    cfg.TRAINER.PROMPTKD = CfgNode()
    cfg.TRAINER.PROMPTKD.N_CTX_VISION = 4  # prompts in every block of the student
    cfg.TRAINER.PROMPTKD.N_CTX_TEXT = 4  # upstream's; the teacher's number comes from its checkpoint
    cfg.TRAINER.PROMPTKD.CTX_INIT = "a photo of a"  # words behind which the teacher's prompts were trained
    cfg.TRAINER.PROMPTKD.PREC = "fp16"  # fp16, bf16, fp32, amp
    cfg.TRAINER.PROMPTKD.PROMPT_DEPTH_VISION = 9  # blocks of the student with prompts; 0 is none
    cfg.TRAINER.PROMPTKD.PROMPT_DEPTH_TEXT = 9  # upstream's; the teacher's depth comes from its checkpoint
    cfg.TRAINER.PROMPTKD.PROJECT_LAYER = 2  # upstream's; the projection has two layers
    cfg.TRAINER.PROMPTKD.CE_WEIGHT = 0.0  # upstream's; labels are never used
    cfg.TRAINER.PROMPTKD.KD_WEIGHT = 1.0  # upstream's scripts take 1000, on fine-grained data 200
    cfg.TRAINER.PROMPTKD.TEMPERATURE = 1.0
    cfg.TRAINER.PROMPTKD.TEACHER_NAME = "ViT-L/14"  # the teacher's backbone: a name, a file, or tiny
    cfg.TRAINER.PROMPTKD.TEACHER_CHECKPOINT = ""  # its PromptSRC checkpoint; "": in ./teacher_model, as upstream


class FeatureProjection(nn.Module):
    """Two layers from the student's width to the teacher's: (B, d) -> (B, d of the teacher)."""

    def __init__(self, student, teacher):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(student, teacher, 1), nn.BatchNorm2d(teacher), nn.ReLU(), nn.Conv2d(teacher, teacher, 1)
        )  # 1 x 1 convolutions are linear layers; upstream's checkpoints have them in this shape

    def forward(self, features):
        several = ranks.total(len(features)) > 1  # one image, left of a batch, has no variance
        self.conv1[1].train(self.training and several)
        return self.conv1(features[..., None, None]).flatten(1)  # (B, d, 1, 1) -> (B, d of the teacher)


class CustomCLIP(CLIPClassifier):
    """The student: an image tower with prompts and a projection. The teacher rides along without being a part of it."""

    def __init__(self, clip_model, teacher, n_ctx, depth):
        super().__init__()
        self.image_encoder = clip_model.visual
        self.logit_scale = clip_model.logit_scale
        self.vision_prompts = own_vision_prompts(clip_model.visual, n_ctx, depth)
        self.VPT_image_trans = FeatureProjection(clip_model.visual.output_dim, teacher.image_encoder.output_dim)
        in_half = {torch.float16: "fp16", torch.bfloat16: "bf16"}
        apply_precision(self.VPT_image_trans, in_half.get(self.dtype, "fp32"))
        self.__dict__["teacher"] = teacher  # no submodule: not trained, not saved, not in train mode

    def encode_image(self, image):
        return self.VPT_image_trans(super().encode_image(image))

    @torch.no_grad()
    def encode_text(self):
        return self.teacher.text_features()

    text_features = encode_text  # of unit length, and kept by the teacher


@TRAINER_REGISTRY.register()
class PromptKD(HostTrainer):
    """Unsupervised prompt distillation."""

    options = "PROMPTKD"
    checkpoint = "VLPromptLearner"
    needs_vision_transformer = True
    split = "test"

    def check_cfg(self, cfg):
        super().check_cfg(cfg)
        if cfg.TRAINER.MODAL not in MODALS:
            raise ValueError(f"TRAINER.MODAL {cfg.TRAINER.MODAL!r} is unknown: choose one of {', '.join(MODALS)}")
        size = cfg.DATALOADER.TRAIN_X.BATCH_SIZE
        if size == 1:
            raise ValueError("DATALOADER.TRAIN_X.BATCH_SIZE is 1: PromptKD's projection normalizes over batches")
        temperature = cfg.TRAINER.PROMPTKD.TEMPERATURE
        if temperature <= 0:
            raise ValueError(f"TRAINER.PROMPTKD.TEMPERATURE {temperature} is not above 0: raise it")

    def make_model(self, clip_model, class_names):
        options = self.host_options
        self.model_teacher = self.make_teacher(class_names)
        layers = clip_model.visual.transformer.layers
        depth = checked_depth(options.PROMPT_DEPTH_VISION, layers, "TRAINER.PROMPTKD.PROMPT_DEPTH_VISION", least=0)
        return CustomCLIP(clip_model, self.model_teacher, options.N_CTX_VISION, depth)

    def make_teacher(self, class_names):
        """The teacher, frozen, with prompts for these class names."""
        options = self.host_options
        path = (
            options.TEACHER_CHECKPOINT
            or {
                "base2novel": f"./teacher_model/{self.cfg.DATASET.NAME}/VLPromptLearner/model-best.pth.tar",
                "cross": "./teacher_model/ImageNet-xd/VLPromptLearner_large/model.pth.tar-20",
            }[self.cfg.TRAINER.MODAL]
        )
        try:
            state = load_checkpoint(path)["state_dict"]
        except FileNotFoundError:
            raise FileNotFoundError(
                f"the teacher's checkpoint {path} does not exist: train one with --trainer PromptSRC --backbone "
                f"{options.TEACHER_NAME}, or set TRAINER.PROMPTKD.TEACHER_CHECKPOINT"
            ) from None
        if "prompt_learner.ctx" not in state:
            raise ValueError(f"{path} is no checkpoint of PromptSRC: prompt_learner.ctx is missing")
        clip_model = load_backbone(self.cfg, options.PREC, options.TEACHER_NAME)
        require_vision_transformer(clip_model, options.TEACHER_NAME)
        vision = state.get("image_encoder.VPT", ())
        teacher = promptsrc.CustomCLIP(
            class_names,
            clip_model,
            n_text=len(state["prompt_learner.ctx"]),
            n_vision=len(vision),
            text_depth=_depth(state, "text_encoder."),
            vision_depth=_depth(state, "image_encoder.") if len(vision) else 0,
            ctx_init=options.CTX_INIT,
        )
        load_weights(teacher, state, path)
        return teacher.requires_grad_(False).to(self.device).eval()

    def objective(self, images, labels):
        with torch.no_grad():
            teacher_logits = self.model_teacher(images)  # (B, C)
        logits = self.model(images)  # (B, C)
        loss = distillation_loss(logits, teacher_logits, self.host_options.TEMPERATURE)
        return self.host_options.KD_WEIGHT * loss, {
            "agreement": compute_accuracy(logits, teacher_logits.argmax(1))[0].item()
        }

    def after_train(self):
        if self.cfg.TRAINER.MODAL == "base2novel" and not self.cfg.TEST.NO_TEST:
            self.test(split="val")  # the base classes; the others follow
        super().after_train()

    def test(self, split=None):
        self.split = split or self.cfg.TEST.SPLIT
        return super().test(split)

    def model_inference(self, images):
        return super().model_inference(images)[:, classes_of_split(self.cfg.TRAINER.MODAL, self.num_texts, self.split)]

    @property
    def num_texts(self):
        """Classes that the teacher has texts for."""
        return len(self.model_teacher.tokenized_prompts)


def _depth(state, tower):
    return 1 + sum(key.startswith(tower) and key.endswith("VPT_shallow") for key in state)
