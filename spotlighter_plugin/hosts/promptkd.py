"""PromptKD: a student image tower with prompts, distilled from a larger teacher that also gives the text embeddings."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import HostAdapter


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL from the teacher's distribution over classes to the student's; logits (B, C), mean over B and C."""
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.softmax(teacher_logits.to(logits.dtype) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="sum") * temperature**2 / logits.numel()


def classes_of_split(modal: str, n_classes: int, split: str) -> slice:
    """The classes that a split is tested on: under "base2novel" the first half in val and the others in test."""
    if modal != "base2novel":
        return slice(None)
    half = math.ceil(n_classes / 2)
    return slice(None, half) if split == "val" else slice(half, None)


class PromptKDAdapter(HostAdapter):
    """teacher: a model that gives (image features, text features, logits), or has text_features() and gives logits.

    kd_weight, temperature: of the distillation loss.
    """

    name = "PromptKD"
    looks_for = "VPT_image_trans (the projection to the teacher's width), image_encoder, logit_scale"
    train_text = False
    guesses_labels = True
    hand_written_text = False  # t⁰ is the teacher's: that of the student's own tower lives in another space

    def __init__(self, model, class_names=None, teacher=None, kd_weight=1.0, temperature=1.0):
        self.teacher = teacher if teacher is not None else getattr(model, "teacher", None)
        if self.teacher is None:
            raise ValueError("PromptKD takes texts and labels from its teacher: pass PromptKDAdapter(…, teacher=model)")
        self.kd_weight, self.temperature = kd_weight, temperature
        self._taught = (None, None)  # the latest images and the teacher's logits on them
        super().__init__(model, class_names)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return all(hasattr(model, part) for part in ("VPT_image_trans", "image_encoder", "logit_scale"))

    @property
    def n_classes(self) -> int:
        return len(self.teacher.tokenized_prompts)

    @torch.no_grad()
    def encode_text(self) -> Tensor:
        """The teacher's text embeddings (C, d of the teacher)."""
        teacher = self.teacher
        if hasattr(teacher, "text_features"):
            return teacher.text_features()
        device = self.logit_scale.device
        return teacher.text_encoder(teacher.prompt_learner().to(device), teacher.tokenized_prompts.to(device))

    def encode_image(self, images: Tensor) -> Tensor:
        """The student's embeddings in the teacher's space, (B, d of the teacher)."""
        return self.model.VPT_image_trans(super().encode_image(images))

    def project(self, joint: Tensor) -> Tensor:
        """From the student's joint space to the teacher's, at running statistics: (…, d) -> (…, d of the teacher)."""
        first, norm, relu, last = self.model.VPT_image_trans.conv1
        x = F.linear(joint.type(first.weight.dtype), first.weight.flatten(1), first.bias)
        x = (x.float() - norm.running_mean) * (norm.running_var + norm.eps).rsqrt() * norm.weight + norm.bias
        return F.linear(x.relu().type(last.weight.dtype), last.weight.flatten(1), last.bias)

    @torch.no_grad()
    def teacher_logits(self, images: Tensor) -> Tensor:
        """The teacher's logits (B, C), computed once per batch."""
        taught = self._taught
        if taught[0] is not images:
            output = self.teacher(images)
            taught = self._taught = (images, output[-1] if isinstance(output, tuple) else output)
        return taught[1]

    def classification_loss(self, logits: Tensor, labels: Tensor, extras: dict) -> Tensor:
        """The distillation loss; labels are not looked at."""
        return self.kd_weight * distillation_loss(logits, self.teacher_logits(extras["images"]), self.temperature)

    def assignment_labels(self, images: Tensor, labels: Tensor) -> Tensor:
        """The teacher's pseudo-labels (B,)."""
        return self.teacher_logits(images).argmax(dim=1)
