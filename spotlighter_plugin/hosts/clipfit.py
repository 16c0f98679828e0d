"""CLIPFit: no prompt; the text tower's biases and the image tower's LayerNorms are trained, texts held near CLIP's."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..towers.packing import packed
from .base import HostAdapter


class CLIPFitAdapter(HostAdapter):
    """similarity_weight: of the loss that holds the texts near the frozen ones (upstream's code has 8)."""

    name = "CLIPFit"
    looks_for = "prompt_learner with image_encoder, text_encoder, clip_prompt and text_features"

    def __init__(self, model, class_names=None, similarity_weight=8.0):
        self.similarity_weight = similarity_weight
        super().__init__(model, class_names)

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

    def objective(self, logits: Tensor, labels: Tensor, extras: dict) -> Tensor:
        """Cross entropy, and the host's own loss 1 - mean cos(text, frozen text)."""
        similarity = F.cosine_similarity(extras["text"].float(), self.model.prompt_learner.text_features.float()).mean()
        return self.classification_loss(logits, labels, extras) + self.similarity_weight * (1 - similarity)
