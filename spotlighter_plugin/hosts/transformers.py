"""transformers' CLIPModel and SiglipModel, with class names in a hand-written prompt."""

from collections.abc import Callable

from torch import Tensor, nn

from ..towers.clip import tokenize
from .base import CLIPAdapter

CLIP_VOCABULARY = 49408  # OpenAI's byte pairs


class TransformersAdapter(CLIPAdapter):
    name = "transformers"
    looks_for = "vision_model, text_model, get_text_features, logit_scale (and class_names)"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        parts = ("vision_model", "text_model", "get_text_features", "get_image_features", "logit_scale")
        return all(hasattr(model, part) for part in parts)

    @staticmethod
    def find_tokenizer(model) -> Callable:
        """OpenAI's tokens where the vocabulary is OpenAI's; otherwise the tokenizer saved with the model."""
        text = model.config.text_config
        if text.vocab_size == CLIP_VOCABULARY:
            return lambda texts: tokenize(texts)[:, : text.max_position_embeddings]
        name = getattr(model, "name_or_path", "")
        try:
            from transformers import AutoTokenizer

            own = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # whatever a hub that is out of reach gives
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"no tokenizer of {name!r} ({reason}): pass the adapter a tokenizer=…") from None
        options = {"padding": "max_length", "max_length": text.max_position_embeddings, "truncation": True}
        return lambda texts: own(texts, return_tensors="pt", **options)["input_ids"]

    @property
    def vision(self) -> nn.Module:
        return self.model.vision_model

    @property
    def projection(self) -> nn.Module | None:
        return getattr(self.model, "visual_projection", None)

    @property
    def preprocess(self) -> Callable:
        """The image processor saved with the model, or its kind's with the model's size."""
        import transformers

        try:
            own = transformers.AutoImageProcessor.from_pretrained(self.model.name_or_path)
        except Exception:  # a model that was never saved, or a hub that is out of reach
            height, width = self.layout.image_size
            kind = "Siglip" if self.projection is None else "CLIP"
            size = {"height": height, "width": width} if kind == "Siglip" else {"shortest_edge": height}
            crop = {} if kind == "Siglip" else {"crop_size": {"height": height, "width": width}}
            own = getattr(transformers, f"{kind}ImageProcessor")(size=size, **crop)
        return lambda picture: own(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    @property
    def logit_bias(self) -> Tensor | float:
        return getattr(self.model, "logit_bias", 0.0)

    def encode_tokens(self, ids: Tensor) -> Tensor:
        return _embedding(self.model.get_text_features(input_ids=ids))

    def encode_image(self, images: Tensor) -> Tensor:
        return _embedding(self.model.get_image_features(pixel_values=images.to(self.layout.dtype)))


def _embedding(output) -> Tensor:
    """Since version 5 the embedding stands in an output's place of the pooled state."""
    return output if isinstance(output, Tensor) else output.pooler_output
