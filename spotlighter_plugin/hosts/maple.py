"""MaPLe: prompts in both towers, the image tower's projected from the text tower's."""

from torch import Tensor, nn

from ..towers.packing import packed
from .base import HostAdapter

CLASSLESS = {"ctx", "proj", "compound_prompts_text", "compound_prompt_projections"}
"""What is trained in its learner; nothing of it belongs to a class."""


class MaPLeAdapter(HostAdapter):
    name = "MaPLe"
    looks_for = "prompt_learner.compound_prompts_text and compound_prompt_projections, image_encoder, text_encoder"

    classifies = True

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        learner = getattr(model, "prompt_learner", None)
        learned = ("compound_prompts_text", "compound_prompt_projections")
        parts = ("tokenized_prompts", "image_encoder", "text_encoder", "logit_scale")
        return all(hasattr(learner, part) for part in learned) and all(hasattr(model, part) for part in parts)

    def encode_text(self) -> Tensor:
        if hasattr(self.model, "encode_text"):
            return self.model.encode_text()
        encoder, ids, learner = self.model.text_encoder, self.model.tokenized_prompts, self.model.prompt_learner
        prompts, _, deep_text, _ = learner()  # upstream's towers are given their prompts
        with packed(encoder, ids, learner, CLASSLESS):
            return encoder(prompts, ids, deep_text)

    def encode_image(self, images: Tensor) -> Tensor:
        if hasattr(self.model, "encode_image"):
            return self.model.encode_image(images)
        _, first, _, deep_vision = self.model.prompt_learner()
        return self.vision(images.type(self.model.dtype), first, deep_vision)
