"""CoCoOp: CoOp whose context moves with what an image looks like (Zhou et al., "Conditional Prompt Learning for
Vision-Language Models", CVPR 2022)."""

from collections import OrderedDict

import torch
from dassl.engine import TRAINER_REGISTRY
from torch import nn
from yacs.config import CfgNode

from spotlighter_plugin.towers.prompts import PromptedCLIP, PromptLearner, normalize
from spotlighter_plugin.trainer import SpotlighterAttachedMixin

from .coop import CoOp

TEXTS = 2048  # at once, where no gradient is kept


def extend_cfg(cfg):
    """Add the options of CoCoOp."""
    cfg.TRAINER.COCOOP = CfgNode()
    cfg.TRAINER.COCOOP.N_CTX = 16  # context vectors
    cfg.TRAINER.COCOOP.CTX_INIT = ""  # words to start from; their number then replaces N_CTX
    cfg.TRAINER.COCOOP.PREC = "fp16"  # fp16, bf16, fp32, amp


class MetaPromptLearner(PromptLearner):
    """A context, and the net that moves all its vectors alike by what an image looks like."""

    def __init__(self, class_names, clip_model, n_ctx, ctx_init):
        super().__init__(class_names, clip_model, n_ctx, ctx_init)
        dim, width = clip_model.visual.output_dim, self.ctx.shape[-1]
        layers = OrderedDict(linear1=nn.Linear(dim, dim // 16), relu=nn.ReLU(), linear2=nn.Linear(dim // 16, width))
        self.meta_net = nn.Sequential(layers).type(clip_model.dtype)

    def beginnings(self, image):
        """What all classes' prompts begin with for each image (B, d), of unit length: (B, shared, w)."""
        ctx = self.ctx + self.meta_net(image).unsqueeze(1)  # (B, n_ctx, w)
        start, more = self.token_prefix[:1], self.token_suffix[:1, : self.shared - 1 - self.n_ctx]
        start, more = (part.expand(len(image), -1, -1) for part in (start, more))
        return torch.cat([start, ctx.type(start.dtype), more], dim=1)


class CustomCLIP(PromptedCLIP):
    """CLIP with texts for each image. ``text_features`` are those that no image has moved."""

    def __init__(self, cfg, class_names, clip_model):
        options = cfg.TRAINER.COCOOP
        n_ctx = 0 if options.CTX_INIT else options.N_CTX
        super().__init__(clip_model, MetaPromptLearner(class_names, clip_model, n_ctx, options.CTX_INIT))

    def texts_of(self, image):
        """Each image's own texts: (B, d), of unit length → (B, C, d), of unit length."""
        learner = self.prompt_learner
        prompts = learner(), self.tokenized_prompts, learner.shared, learner.beginnings(image)
        return normalize(self.text_encoder(*prompts))

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, C)."""
        image = normalize(self.encode_image(images))  # (B, d)
        at_once = len(image) if torch.is_grad_enabled() else max(1, TEXTS // self.prompt_learner.n_cls)
        logits = [torch.einsum("bd,bcd->bc", part, self.texts_of(part)) for part in image.split(at_once)]
        return self.logit_scale.exp() * torch.cat(logits)


@TRAINER_REGISTRY.register()
class CoCoOp(CoOp):
    """Conditional context optimization."""

    options = "COCOOP"

    def make_model(self, clip_model, class_names):
        return CustomCLIP(self.cfg, class_names, clip_model)


@TRAINER_REGISTRY.register()
class CoCoOpSpotlighter(SpotlighterAttachedMixin, CoCoOp):
    """CoCoOp with Spotlighter: an image's texts are those of what is seen in the tokens that are kept."""
