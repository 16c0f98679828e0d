"""CoOp: learned context words in the prompt (Zhou et al., "Learning to Prompt for Vision-Language Models", 2022)."""

import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from dassl.metrics import compute_accuracy
from yacs.config import CfgNode

from spotlighter_plugin.towers.prompts import PromptedCLIP, PromptLearner

from .host import HostTrainer


def extend_cfg(cfg):
    """Add the options of CoOp."""
    cfg.TRAINER.COOP = CfgNode()
    cfg.TRAINER.COOP.N_CTX = 16  # context vectors
    cfg.TRAINER.COOP.CSC = False  # a context of its own for each class
    cfg.TRAINER.COOP.CTX_INIT = ""  # words to start from; their number then replaces N_CTX
    cfg.TRAINER.COOP.PREC = "fp16"  # fp16, bf16, fp32, amp
    cfg.TRAINER.COOP.CLASS_TOKEN_POSITION = "end"  # end, middle, front


class CustomCLIP(PromptedCLIP):
    """CLIP whose prompts have learned context words."""

    def __init__(self, cfg, class_names, clip_model):
        options = cfg.TRAINER.COOP
        learner = PromptLearner(
            class_names,
            clip_model,
            n_ctx=0 if options.CTX_INIT else options.N_CTX,
            ctx_init=options.CTX_INIT,
            per_class=options.CSC,
            position=options.CLASS_TOKEN_POSITION,
        )
        super().__init__(clip_model, learner)


@TRAINER_REGISTRY.register()
class CoOp(HostTrainer):
    """Context optimization."""

    options = "COOP"

    def make_model(self, clip_model, class_names):
        return CustomCLIP(self.cfg, class_names, clip_model)

    def registered(self, model):
        return model.prompt_learner

    def objective(self, images, labels):
        logits = self.model(images)  # (B, C)
        return F.cross_entropy(logits, labels), {"acc": compute_accuracy(logits, labels)[0].item()}
