"""CoOp: learned context words in front of the class name, both towers frozen; KgCoOp: CoOp held near CLIP's texts."""

from torch import Tensor, nn

from ..towers.packing import packed
from .base import HeldNearAdapter, HostAdapter

OTHERS = ("proj", "meta_net", "compound_prompts_text", "ZS_image_encoder")  # MaPLe's, CoCoOp's, PromptSRC's


class CoOpAdapter(HostAdapter):
    name = "CoOp"
    looks_for = "prompt_learner.ctx with no prompts for the vision tower, image_encoder, text_encoder"

    classifies = True

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return _has_context(model) and not hasattr(model.prompt_learner, "text_features")

    def encode_text(self) -> Tensor:
        model = self.model
        if hasattr(model, "encode_text"):
            return model.encode_text()
        with packed(model.text_encoder, model.tokenized_prompts, model.prompt_learner, {"ctx"}):
            return model.text_encoder(model.prompt_learner(), model.tokenized_prompts)


class KgCoOpAdapter(HeldNearAdapter, CoOpAdapter):
    name = "KgCoOp"
    looks_for = "as CoOp, and prompt_learner.text_features"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return _has_context(model) and hasattr(model.prompt_learner, "text_features")


def _has_context(model):
    parts = ("prompt_learner", "tokenized_prompts", "image_encoder", "text_encoder", "logit_scale")
    learner = getattr(model, "prompt_learner", None)
    return (
        all(hasattr(model, part) for part in parts)
        and hasattr(learner, "ctx")
        and not any(hasattr(learner, other) for other in OTHERS)
    )
