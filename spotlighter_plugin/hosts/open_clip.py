"""open_clip's CLIP and SigLIP: what `create_model_and_transforms` gives, with class names in a hand-written prompt."""

from collections.abc import Callable

from torch import Tensor, nn

from .base import CLIPAdapter

CLIP_VOCABULARY = 49408  # OpenAI's byte pairs


class OpenCLIPAdapter(CLIPAdapter):
    name = "open_clip"
    looks_for = "visual, encode_text, logit_scale, lock_image_tower (and class_names)"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return all(hasattr(model, part) for part in ("visual", "encode_text", "logit_scale", "lock_image_tower"))

    @staticmethod
    def find_tokenizer(model) -> Callable:
        """open_clip's own, by vocabulary and length: the model does not know its name."""
        import open_clip

        text = getattr(model, "text", model)
        if text.vocab_size == CLIP_VOCABULARY:
            return open_clip.SimpleTokenizer(context_length=text.context_length)
        given = {"vocab_size": text.vocab_size, "context_length": text.context_length}
        for name in open_clip.list_models():
            config = open_clip.get_model_config(name)["text_cfg"]
            if all(config.get(key) == value for key, value in given.items()):
                return _named(name)
        raise ValueError(f"no model of open_clip's has a text tower with {given}: pass the adapter a tokenizer=…")

    @property
    def vision(self) -> nn.Module:
        return self.model.visual

    @property
    def preprocess(self) -> Callable:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        settings = getattr(self.model.visual, "preprocess_cfg", None) or {"size": self.layout.image_size}
        return image_transform_v2(PreprocessCfg(**settings), is_train=False)

    @property
    def logit_bias(self) -> Tensor | float:
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else bias

    def encode_image(self, images) -> Tensor:
        return self.model.encode_image(images.to(self.layout.dtype))


def _named(name: str) -> Callable:
    import open_clip

    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:  # whatever a hub that is out of reach gives
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"the tokenizer of {name} could not be had ({reason}): pass the adapter a tokenizer=…"
        ) from None
