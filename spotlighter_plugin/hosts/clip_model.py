"""A plain CLIP: what `clip.load` gives, with class names in a hand-written prompt."""

from torch import Tensor, nn

from ..towers.clip import tokenize
from .base import HostAdapter


class CLIPModelAdapter(HostAdapter):
    """template: the prompt, with {} where the class name goes. Raises ValueError without class names."""

    name = "CLIP"
    looks_for = "visual, encode_text, token_embedding, logit_scale (and class_names)"

    def __init__(self, model, class_names=None, template="a photo of a {}."):
        if not class_names:
            raise ValueError("a plain CLIP knows no classes: pass class_names=[...]")
        self.tokens = tokenize([template.format(name.replace("_", " ")) for name in class_names])  # (C, 77)
        super().__init__(model, class_names)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return all(hasattr(model, part) for part in ("visual", "encode_text", "token_embedding", "logit_scale"))

    @property
    def vision(self) -> nn.Module:
        return self.model.visual

    def encode_text(self) -> Tensor:
        return self.model.encode_text(self.tokens.to(self.logit_scale.device))
