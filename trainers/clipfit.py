"""CLIPFit: CLIP's own text biases and image LayerNorms, fine-tuned (Li et al., "Vision-Language Model Fine-Tuning via
Simple Parameter-Efficient Modification", EMNLP 2024)."""

import torch
from dassl.engine import TRAINER_REGISTRY
from torch import nn
from yacs.config import CfgNode

from spotlighter_plugin.towers.clip import tokenize
from spotlighter_plugin.towers.packing import common_prefix
from spotlighter_plugin.towers.prompts import CLIPClassifier, TextEncoder

from .host import HostTrainer, hand_written, held_near


def extend_cfg(cfg):
    """Add the options of CLIPFit."""
    cfg.TRAINER.CLIPFIT = CfgNode()
    cfg.TRAINER.CLIPFIT.PREC = "fp16"  # fp16, bf16, fp32, amp
    cfg.TRAINER.CLIPFIT.LAMBDA = 8.0  # weight of the similarity to the frozen text embeddings


class FittedTowers(nn.Module):
    """Both towers, with the hand-written prompt of each class and its frozen embedding."""

    def __init__(self, texts, clip_model):
        super().__init__()
        self.image_encoder = clip_model.visual
        self.text_encoder = TextEncoder(clip_model)
        self.clip_tokenized_prompt = tokenize(texts)  # (C, 77)
        with torch.no_grad():
            device = clip_model.token_embedding.weight.device
            prompt = clip_model.token_embedding(self.clip_tokenized_prompt.to(device)).type(clip_model.dtype)
            self.shared = common_prefix(self.clip_tokenized_prompt)
            frozen = self.text_encoder(prompt, self.clip_tokenized_prompt, self.shared)
        self.register_buffer("clip_prompt", prompt, persistent=False)  # (C, 77, w)
        self.register_buffer("text_features", frozen, persistent=False)  # (C, d), before any training
        for name, parameter in self.text_encoder.named_parameters():
            parameter.requires_grad_(name.endswith("mlp.c_proj.bias"))
        for name, parameter in self.image_encoder.named_parameters():
            parameter.requires_grad_("ln_" in name)


class CustomCLIP(CLIPClassifier):
    """CLIP with trained biases and LayerNorms; no prompt is learned, whatever upstream's name for the part says."""

    def __init__(self, texts, clip_model):
        super().__init__()
        self.prompt_learner = FittedTowers(texts, clip_model)
        self.logit_scale = clip_model.logit_scale

    @property
    def image_encoder(self):
        return self.prompt_learner.image_encoder

    def encode_text(self):
        towers = self.prompt_learner
        return towers.text_encoder(towers.clip_prompt, towers.clip_tokenized_prompt, towers.shared)


@TRAINER_REGISTRY.register()
class CLIPFit(HostTrainer):
    """Fine-tuning of text biases and image LayerNorms."""

    options = "CLIPFIT"
    needs_vision_transformer = True

    def make_model(self, clip_model, class_names):
        return CustomCLIP(hand_written(self.cfg, class_names), clip_model)

    def registered(self, model):
        return model.prompt_learner

    def objective(self, images, labels):
        frozen = self.model.prompt_learner.text_features  # (C, d)
        return held_near(self.model, frozen, self.host_options.LAMBDA, images, labels)
