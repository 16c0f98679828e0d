"""MaPLe: prompts in both towers, the image tower's projected from the text tower's (Khattak et al., CVPR 2023)."""

import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from dassl.metrics import compute_accuracy
from torch import nn, randn
from yacs.config import CfgNode

from spotlighter_plugin.towers.deep_prompts import DeepPrompts, checked_depth
from spotlighter_plugin.towers.prompts import PromptedCLIP, PromptLearner

from .host import HostTrainer


def extend_cfg(cfg):
    """Add the options of MaPLe."""
    cfg.TRAINER.MAPLE = CfgNode()
    cfg.TRAINER.MAPLE.N_CTX = 2  # prompts in every block
    cfg.TRAINER.MAPLE.CTX_INIT = "a photo of a"  # the first N_CTX of these words start the text prompts
    cfg.TRAINER.MAPLE.PREC = "fp16"  # fp16, bf16, fp32, amp
    cfg.TRAINER.MAPLE.PROMPT_DEPTH = 9  # blocks with prompts of their own; 1 is the first block alone


class MultiModalPromptLearner(PromptLearner):
    """Text prompts of each block, and the projections that make the image tower's prompts of them.

    Calling it gives what upstream's gives: token embeddings (C, 77, w_text), the image tower's first prompts (n, w),
    and lists of the deeper blocks' text prompts (n, w_text) and image prompts (n, w).
    """

    def __init__(self, class_names, clip_model, n_ctx, ctx_init, depth):
        super().__init__(class_names, clip_model, n_ctx, ctx_init)
        text_width, width = self.ctx.shape[-1], clip_model.visual.transformer.width
        deeper = range(depth - 1)
        self.proj = nn.Linear(text_width, width).type(clip_model.dtype)
        self.compound_prompts_text = nn.ParameterList(nn.Parameter(randn(n_ctx, text_width) * 0.02) for _ in deeper)
        self.compound_prompt_projections = nn.ModuleList(nn.Linear(text_width, width) for _ in deeper)
        for layer in self.compound_prompt_projections[1:]:  # all start alike
            layer.load_state_dict(self.compound_prompt_projections[0].state_dict())

    def text_prompts(self, block):
        """Text prompts of block 1, 2, …: (n, w_text)."""
        return self.compound_prompts_text[block - 1]

    def vision_prompts(self, block):
        """Image prompts of block 0, 1, …: (n, w)."""
        if block == 0:
            return self.proj(self.ctx)
        return self.compound_prompt_projections[block - 1](self.text_prompts(block))

    def forward(self):
        deeper = range(1, 1 + len(self.compound_prompts_text))
        vision = [self.vision_prompts(block) for block in deeper]
        return super().forward(), self.vision_prompts(0), list(self.compound_prompts_text), vision


class CustomCLIP(PromptedCLIP):
    """CLIP with coupled prompts in both towers."""

    def __init__(self, cfg, class_names, clip_model):
        options = cfg.TRAINER.MAPLE
        text, vision = clip_model.transformer, clip_model.visual.transformer
        depth = checked_depth(options.PROMPT_DEPTH, max(text.layers, vision.layers), "TRAINER.MAPLE.PROMPT_DEPTH")
        learner = MultiModalPromptLearner(class_names, clip_model, options.N_CTX, options.CTX_INIT, depth)
        super().__init__(clip_model, learner)
        self.text_prompts = DeepPrompts(learner.text_prompts, learner.n_ctx).into_text(text, depth)
        self.vision_prompts = DeepPrompts(learner.vision_prompts, learner.n_ctx).into_vision(clip_model.visual, depth)

    def encode_text(self):
        prompts = PromptLearner.forward(self.prompt_learner)
        return self.text_encoder(prompts, self.tokenized_prompts, self.prompt_learner.shared)


@TRAINER_REGISTRY.register()
class MaPLe(HostTrainer):
    """Multi-modal prompt learning."""

    options = "MAPLE"
    checkpoint = "MultiModalPromptLearner"
    needs_vision_transformer = True

    def make_model(self, clip_model, class_names):
        return CustomCLIP(self.cfg, class_names, clip_model)

    def objective(self, images, labels):
        logits = self.model(images)  # (B, C)
        return F.cross_entropy(logits, labels), {"acc": compute_accuracy(logits, labels)[0].item()}
