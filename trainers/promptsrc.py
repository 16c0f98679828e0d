"""PromptSRC: independent prompts in both towers, held near frozen CLIP (Khattak et al., ICCV 2023).

It is also the trainer of PromptKD's teacher.
"""

import math

import torch
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from dassl.metrics import compute_accuracy
from torch import nn
from yacs.config import CfgNode

from spotlighter_plugin.towers.clip import encode_tokens, tokenize
from spotlighter_plugin.towers.deep_prompts import checked_depth, own_text_prompts, own_vision_prompts
from spotlighter_plugin.towers.packing import common_prefix
from spotlighter_plugin.towers.prompts import PromptedCLIP, PromptLearner, normalize

from .host import HostTrainer

_KINDS = ("bad", "good", "blurry", "bright", "dark", "small", "large", "low-resolution", "cropped", "close-up")
_ARTS = ("drawing", "painting", "sketch", "cartoon", "sculpture", "rendering", "origami", "toy", "tattoo", "plastic")
ENSEMBLE = tuple(
    [f"a {kind} photo of {article} {{}}." for kind in _KINDS for article in ("a", "the")]
    + [f"{article} {art} of a {{}}." for art in _ARTS for article in ("a", "the")]
    + ["a photo of a {}.", "a photo of the {}.", "a photo of one {}.", "a photo of many {}.", "a photo of my {}."]
)
"""Sentences whose mean embedding is the frozen text that the text regulariser pulls towards."""


def extend_cfg(cfg):
    """Add the options of PromptSRC."""
    cfg.TRAINER.PROMPTSRC = CfgNode()
    cfg.TRAINER.PROMPTSRC.N_CTX_VISION = 4  # prompts in every block of the image tower
    cfg.TRAINER.PROMPTSRC.N_CTX_TEXT = 4  # prompts in every block of the text tower
    cfg.TRAINER.PROMPTSRC.CTX_INIT = "a photo of a"  # words that start the text prompts of the first block
    cfg.TRAINER.PROMPTSRC.PREC = "fp16"  # fp16, bf16, fp32, amp
    cfg.TRAINER.PROMPTSRC.PROMPT_DEPTH_VISION = 9  # blocks with prompts; 0 is none
    cfg.TRAINER.PROMPTSRC.PROMPT_DEPTH_TEXT = 9  # blocks with prompts, at least 1
    cfg.TRAINER.PROMPTSRC.TEXT_LOSS_WEIGHT = 25
    cfg.TRAINER.PROMPTSRC.IMAGE_LOSS_WEIGHT = 10
    cfg.TRAINER.PROMPTSRC.GPA_MEAN = 15  # epoch whose prompts weigh most in the final ensemble
    cfg.TRAINER.PROMPTSRC.GPA_STD = 1  # in epochs


class CustomCLIP(PromptedCLIP):
    """CLIP with independent prompts in both towers: VPT and VPT_shallow beside the learned context."""

    def __init__(self, class_names, clip_model, n_text, n_vision, text_depth, vision_depth, ctx_init):
        super().__init__(clip_model, PromptLearner(class_names, clip_model, n_text, ctx_init))
        self.text_prompts = own_text_prompts(clip_model.transformer, n_text, text_depth)
        self.vision_prompts = own_vision_prompts(clip_model.visual, n_vision, vision_depth)


@TRAINER_REGISTRY.register()
class PromptSRC(HostTrainer):
    """Self-regulating prompts."""

    options = "PROMPTSRC"
    checkpoint = "VLPromptLearner"
    needs_vision_transformer = True

    def make_model(self, clip_model, class_names):
        options = self.host_options
        model = CustomCLIP(
            class_names,
            clip_model,
            n_text=options.N_CTX_TEXT,
            n_vision=options.N_CTX_VISION,
            text_depth=checked_depth(
                options.PROMPT_DEPTH_TEXT, clip_model.transformer.layers, "TRAINER.PROMPTSRC.PROMPT_DEPTH_TEXT"
            ),
            vision_depth=checked_depth(
                options.PROMPT_DEPTH_VISION,
                clip_model.visual.transformer.layers,
                "TRAINER.PROMPTSRC.PROMPT_DEPTH_VISION",
                least=0,
            ),
            ctx_init=options.CTX_INIT,
        )
        self.token_embedding = clip_model.token_embedding
        self.fixed_text = None  # (C, d), made when training begins
        self.ensemble = PromptEnsemble(model, gaussian_weights(self.cfg.OPTIM.MAX_EPOCH, options))
        return model

    def build_model(self):
        super().build_model()
        self.register_model("PromptEnsemble", self.ensemble.to(self.device))

    def objective(self, images, labels):
        options, model = self.host_options, self.model
        image, text = normalize(model.encode_image(images)), model.text_features()  # (B, d), (C, d)
        with torch.no_grad():
            fixed_text = self.frozen_text()
            with model.vision_prompts.off():
                fixed_image = normalize(model.encode_image(images))  # (B, d)
            fixed_logits = model.logit_scale.exp() * fixed_image @ fixed_text.t()  # (B, C)
        logits = model.logit_scale.exp() * image @ text.t()
        loss = (
            F.cross_entropy(logits, labels)
            + options.TEXT_LOSS_WEIGHT * F.l1_loss(text, fixed_text)
            + options.IMAGE_LOSS_WEIGHT * F.l1_loss(image, fixed_image)
            + F.kl_div(logits.log_softmax(1), fixed_logits.log_softmax(1), reduction="sum", log_target=True)
            / logits.numel()
        )
        return loss, {"acc": compute_accuracy(logits, labels)[0].item()}

    @torch.no_grad()
    def frozen_text(self):
        """Each class's mean embedding over the ensemble of sentences through CLIP without prompts, (C, d)."""
        if self.fixed_text is None:
            names = [name.replace("_", " ") for name in self.dm.dataset.classnames]
            table, encoder = self.token_embedding.to(self.device), self.model.text_encoder
            total = 0
            with self.model.text_prompts.off():
                for template in ENSEMBLE:
                    ids = tokenize([template.format(name) for name in names])  # (C, 77)
                    embeddings = table(ids.to(self.device)).type(self.model.dtype)  # (C, 77, w)
                    total = total + encode_tokens(encoder, embeddings, ids, common_prefix(ids))
            self.fixed_text = normalize(total)
        return self.fixed_text

    def forward_backward(self, batch):
        summary = super().forward_backward(batch)
        if self.batch_idx + 1 == self.num_batches:
            self.ensemble.add(self.model, self.epoch)
            if self.epoch + 1 == self.max_epoch:
                print("The prompts of all epochs are averaged for the final model")
                self.ensemble.write_into(self.model)
        return summary


def gaussian_weights(epochs, options):
    """Weight of each epoch's prompts in the final ensemble: (epochs,), summing to 1."""
    weights = [math.exp(-0.5 * ((e - options.GPA_MEAN) / options.GPA_STD) ** 2) for e in range(1, epochs + 1)]
    if not sum(weights):
        raise ValueError(
            f"TRAINER.PROMPTSRC.GPA_MEAN {options.GPA_MEAN} is too far from the last epoch {epochs} for "
            f"GPA_STD {options.GPA_STD}: lower GPA_MEAN or raise GPA_STD"
        )
    return [weight / sum(weights) for weight in weights]


class PromptEnsemble(nn.Module):
    """Gaussian-weighted sum of the trained parameters over the epochs; saved, so that a resumed run ends alike."""

    def __init__(self, model, weights):
        super().__init__()
        self.weights = weights
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        for name in self.names:
            self.register_buffer(name.replace(".", "|"), torch.zeros_like(model.get_parameter(name), dtype=torch.float))

    @torch.no_grad()
    def add(self, model, epoch):
        for name in self.names:
            self.get_buffer(name.replace(".", "|")).add_(model.get_parameter(name), alpha=self.weights[epoch])

    @torch.no_grad()
    def write_into(self, model):
        for name in self.names:
            model.get_parameter(name).copy_(self.get_buffer(name.replace(".", "|")))
