"""CLIPFit: no prompt; the text tower's biases and the image tower's LayerNorms are trained, texts held near CLIP's."""

from torch import Tensor, nn

from ..towers.packing import packed
from .base import HeldNearAdapter


class CLIPFitAdapter(HeldNearAdapter):
    name = "CLIPFit"
    looks_for = "prompt_learner with image_encoder, text_encoder, clip_prompt and text_features"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        towers = getattr(model, "prompt_learner", None)
        parts = ("image_encoder", "text_encoder", "clip_prompt", "clip_tokenized_prompt", "text_features")
        return all(hasattr(towers, part) for part in parts) and hasattr(model, "logit_scale")

    @property
    def n_classes(self) -> int:
        return len(self.model.prompt_learner.clip_tokenized_prompt)

    @property
    def vision(self) -> nn.Module:
        return self.model.prompt_learner.image_encoder

    def encode_text(self) -> Tensor:
        if hasattr(self.model, "encode_text"):
            return self.model.encode_text()
        towers, ids = self.model.prompt_learner, self.model.prompt_learner.clip_tokenized_prompt
        with packed(towers.text_encoder, ids, nn.Module(), set()):  # its prompts are not trained
            return towers.text_encoder(towers.clip_prompt, ids)
