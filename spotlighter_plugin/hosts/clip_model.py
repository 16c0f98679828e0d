"""OpenAI's CLIP: what `clip.load` gives, with class names in a hand-written prompt."""

from collections.abc import Callable

from torch import nn

from ..towers.clip import tokenize
from .base import CLIPAdapter


class CLIPModelAdapter(CLIPAdapter):
    name = "CLIP"
    looks_for = "visual, encode_text, token_embedding, logit_scale (and class_names)"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        parts = ("visual", "encode_text", "token_embedding", "logit_scale", "dtype")  # open_clip's has no dtype
        return all(hasattr(model, part) for part in parts) and not hasattr(model, "lock_image_tower")

    @staticmethod
    def find_tokenizer(model) -> Callable:
        return tokenize

    @property
    def vision(self) -> nn.Module:
        return self.model.visual
