"""CoOp with what the authors of Spotlighter released, and, with its image branch off, TextRefiner: for comparison.

Every token runs through every block, so it is never faster than CoOp. In training the tokens leaving the tower go
through a projection that testing does without; the best of them, CLS and their mean are classified one by one, and all
are written into one memory of slots that belong to no class. Texts, and with the image branch the image, are refined by
what they read there. The released code takes the patch before each of the best ones, by a slip; here it is the best.
"""

import torch
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from dassl.metrics import compute_accuracy
from torch import Tensor, nn
from yacs.config import CfgNode

from spotlighter_plugin import ranks
from spotlighter_plugin.method.activation import attention_score
from spotlighter_plugin.method.layout import Attention, Gaze
from spotlighter_plugin.towers.prompts import normalize

from .coop import CoOp, CustomCLIP

BEST, UPPER = 5, 2  # patches by CLS's attention in the last block, and those of them that are level 1


def extend_cfg(cfg):
    """Add the options of CoOpReleased."""
    cfg.TRAINER.RELEASED = CfgNode()
    cfg.TRAINER.RELEASED.IMAGE_BRANCH = True  # False: TextRefiner, without image branch and levels
    cfg.TRAINER.RELEASED.SLOTS = 25
    cfg.TRAINER.RELEASED.ALPHA = 0.2  # weight of what the texts read
    cfg.TRAINER.RELEASED.MOMENTUM = 0.8
    cfg.TRAINER.RELEASED.BALANCE = 50.0  # losses of single tokens are divided by it
    cfg.TRAINER.RELEASED.DISTILL = 20.0  # weight of the L1 distances to what is not refined


class Refiner(nn.Module):
    """What is trained beside the prompts, and the memory U (S, d), of unit length."""

    def __init__(self, width: int, options: CfgNode):
        super().__init__()
        self.alpha, self.momentum = options.ALPHA, options.MOMENTUM
        self.project = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)
        )  # in training alone
        self.text = nn.Linear(2 * width, width, bias=False)
        self.image = nn.MultiheadAttention(width, 8, dropout=0.1, batch_first=True) if options.IMAGE_BRANCH else None
        self.register_buffer("memory", F.normalize(torch.rand(options.SLOTS, width), dim=-1))

    def read(self, queries: Tensor) -> Tensor:
        """softmax(q Uᵀ) U: (n, d)."""
        return (queries @ self.memory.T).softmax(1) @ self.memory

    def texts(self, text: Tensor) -> Tensor:
        """t + α Linear([t ; read(t)]): (C, d)."""
        return text + self.alpha * self.text(torch.cat([text, self.read(text)], -1))

    def refined_image(self, image: Tensor) -> Tensor:
        """What the trained attention makes of the one thing that the image reads: (B, d)."""
        read = self.read(image).unsqueeze(1)
        return self.image(image.unsqueeze(1), read, read, need_weights=False)[0].squeeze(1)

    @torch.no_grad()
    def write(self, tokens: Tensor) -> None:
        """Move each slot towards its tokens (n, d), weighted by softmax over tokens, the slot's largest being 1."""
        tokens = F.normalize(tokens, dim=-1)
        scores = tokens @ self.memory.T  # (n, S)
        weights = scores.softmax(0)
        weights = weights / weights.amax(0)
        mine = F.one_hot(scores.argmax(1), len(self.memory)).to(tokens)  # (n, S)
        moved = self.momentum * self.memory + (1 - self.momentum) * (mine * weights).T @ tokens
        self.memory = F.normalize(torch.where(mine.any(0)[:, None], moved, self.memory), dim=-1)


class ReleasedCLIP(CustomCLIP):
    """CoOp's model with a refiner; ``tokens`` gives what training needs beside the image."""

    def __init__(self, cfg, class_names, clip_model):
        super().__init__(cfg, class_names, clip_model)
        self.refiner = Refiner(clip_model.text_projection.shape[1], cfg.TRAINER.RELEASED)

    def tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens leaving the tower, in the joint space (B, 1+N, d), and the best patches' positions (B, 5)."""
        vision, caught = self.image_encoder, {}
        last = vision.transformer.resblocks[-1]
        hooks = (
            last.register_forward_pre_hook(lambda module, args: caught.update(entering=args[0])),
            last.register_forward_hook(lambda module, args, output: caught.update(leaving=output)),
        )
        self.encode_image(image)
        for hook in hooks:
            hook.remove()
        gaze = Gaze(last.ln_1, Attention(last.attn), lambda entering: entering[0])
        attention = attention_score(caught["entering"], gaze)[:, 1:]  # (B, N)
        joint = vision.ln_post(caught["leaving"]).transpose(0, 1) @ vision.proj  # (B, 1+N, d)
        return joint, 1 + attention.topk(BEST, 1).indices

    def mixed(self, image: Tensor, refined: Tensor | None, share: float) -> Tensor:
        """v, or (1-share) v + share refined(v), (B, d)."""
        return image if refined is None else (1 - share) * image + share * refined

    def classify(self, image: Tensor) -> Tensor:
        """Logits (B, C) of images (B, d) of unit length, as in testing."""
        refined = None if self.refiner.image is None else self.refiner.refined_image(image)
        return self.logit_scale.exp() * self.mixed(image, refined, 0.1) @ self.refiner.texts(self.text_features()).T

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(normalize(self.encode_image(image)))


@TRAINER_REGISTRY.register()
class CoOpReleased(CoOp):
    """CoOp with the released algorithm, or with TextRefiner."""

    def make_model(self, clip_model, class_names):
        return ReleasedCLIP(self.cfg, class_names, clip_model)

    def registered(self, model):
        return nn.ModuleDict({"prompt_learner": model.prompt_learner, "refiner": model.refiner})

    def objective(self, images, labels):
        model, options = self.model, self.cfg.TRAINER.RELEASED
        refiner, scale = model.refiner, model.logit_scale.exp()
        with torch.no_grad():
            joint, best = model.tokens(images)  # (B, 1+N, d), (B, 5)
        image, text = normalize(joint[:, 0]), model.text_features()
        texts = refiner.texts(text)
        refined = None if refiner.image is None else refiner.refined_image(image)
        logits = scale * model.mixed(image, refined, 0.05) @ texts.T  # (B, C)

        tokens = refiner.project(joint.flatten(0, 1)).unflatten(0, joint.shape[:2])  # (B, 1+N, d)
        ends = tokens[:, :1], tokens.mean(1, keepdim=True)

        def one_by_one(positions):
            chosen = tokens.gather(1, positions[..., None].expand(-1, -1, tokens.shape[-1]))
            chosen = torch.cat([chosen, *ends], 1)  # (B, m+2, d)
            single = scale * chosen @ text.T
            return F.cross_entropy(single.flatten(0, 1), labels.repeat_interleave(chosen.shape[1])) / options.BALANCE

        loss = F.cross_entropy(logits, labels) + one_by_one(best)
        loss = loss + options.DISTILL * F.l1_loss(normalize(texts), text)
        if refined is not None:
            loss = loss + one_by_one(best[:, :UPPER]) + one_by_one(best[:, UPPER:])
            loss = loss + options.DISTILL * F.l1_loss(normalize(refined), image)
        refiner.write(ranks.gather(tokens.flatten(0, 1)))
        return loss, {"acc": compute_accuracy(logits, labels)[0].item()}
