"""What the plug-in asks of a host, and the answers that most CLIP prompt-tuning hosts share."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..method.layout import Layout, layout_of
from ..towers import GENERAL

TEXT_CHUNK = 256  # texts that go through a text tower at once


class HostAdapter:
    """Knows where one kind of host keeps its vision tower, its texts and its loss.

    Args:
        model: the host's model; never changed.
        class_names: names of its C classes; numbers stand in for names that nobody gave.
    """

    name = "host"
    looks_for = "nothing"
    """One line: the attributes by which the host is recognised."""
    train_text = True
    """Whether text embeddings change in training; if not, they are computed once."""
    hand_written_text = True
    """Whether t⁰ comes from hand-written prompts; if not, it is what ``encode_text`` gives at the first call."""
    guesses_labels = False
    """Whether ``assignment_labels`` guesses: images are filed by such labels, but the match is not judged by them."""
    prompts_first = False
    """Whether the host's prompts stand between CLS and the patches instead of behind the patches."""
    logit_bias = 0.0
    """What is added to all logits (SigLIP)."""
    classifies = False
    """Whether ``model(images)`` gives logits, which must be the cosines over τ of what this adapter encodes."""
    gives_logits = False
    """Whether ``classify`` gives the host's own logits, which stay as they are but for what the memory adds."""

    def __init__(self, model: nn.Module, class_names: list[str] | None = None):
        self.model = model
        self.class_names = list(class_names or map(str, range(self.n_classes)))
        self._frozen_text = self._layout = self._templates = None

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether ``model`` is this kind of host; never, for an adapter that its caller hands over."""
        return False

    @property
    def n_classes(self) -> int:
        return len(self.model.tokenized_prompts)

    @property
    def vision(self) -> nn.Module:
        """The vision transformer, of a layout that is known (``method.layout``)."""
        return self.model.image_encoder

    @property
    def projection(self) -> nn.Module | Tensor | None:
        """What leads from the vision transformer into the joint space, where that has no projection of its own."""
        return None

    @property
    def layout(self) -> Layout:
        """Where the vision transformer has its parts."""
        if self._layout is None or self._layout.vision is not self.vision:
            self._layout = layout_of(self.vision, self.projection)
        self._layout.prompts_first = self.prompts_first
        return self._layout

    @property
    def logit_scale(self) -> Tensor:
        """1/τ, a scalar."""
        return self.model.logit_scale.exp()

    @property
    def preprocess(self) -> Callable:
        """What makes a tensor (3, h, w) of a picture of Pillow's, as the host was trained on."""
        from clip.clip import _transform

        return _transform(self.layout.image_size[0])

    def encode_text(self) -> Tensor:
        """Embeddings (C, d) of the host's present prompts, with gradient if they are trained, not normalized."""
        raise NotImplementedError

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings (B, d) of images (B, 3, h, w) through the host's own path, not normalized."""
        return self.vision(images.type(self.model.dtype))

    def classify(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """``encode_image``, and the host's own logits (B, C) where these are more than cosines over τ."""
        return self.encode_image(images), None

    def host_logits(self, images: Tensor) -> Tensor | None:
        """What the host itself says of images (B, 3, h, w), (B, C); None where it has no say beyond embeddings."""
        return self.model(images) if self.classifies else None

    def project(self, joint: Tensor) -> Tensor:
        """From the tower's joint space to that of the texts (…, d); not the same where the host adds a projection."""
        return joint

    @property
    @torch.no_grad()
    def dim(self) -> int:
        """d, width of the texts' space."""
        layout = self.layout
        return self.project(layout.read_out(layout.blank_state())).shape[-1]

    def set_frozen_text(self, text: Tensor) -> None:
        """Give t⁰: text embeddings (C, d) of the hand-written prompts through the frozen CLIP, of unit length."""
        self._frozen_text = text.detach().float()

    def frozen_text(self) -> Tensor:
        """t⁰ (C, d), unit length, no gradient. Where nobody gave it: the host's prompts at the first call."""
        if self._frozen_text is None:
            self.set_frozen_text(F.normalize(self.encode_text().detach().float(), dim=-1))
        self._frozen_text = self._frozen_text.to(self.logit_scale.device)
        return self._frozen_text

    def set_templates(self, encode) -> None:
        """Give a function that encodes hand-written templates: the mean over them, (C, d), of unit length."""
        self._templates = encode

    def templates(self) -> Tensor | None:
        """Texts of hand-written templates (C, d), of unit length; None where nobody gave any."""
        return None if self._templates is None else self._templates().to(self.logit_scale.device).float()

    def classification_loss(self, logits: Tensor, labels: Tensor, extras: dict) -> Tensor:
        """The host's loss on logits (B, C); also used for the two levels alone.

        extras: ``images`` (B, 3, h, w) of the batch, ``text`` (C, d) raw text embeddings, and whatever else the caller
        of the wrapper gave.
        """
        return F.cross_entropy(logits, labels)

    def objective(self, logits: Tensor, labels: Tensor, extras: dict) -> Tensor:
        """L_cls: the loss on the final logits together with what else the host minimises."""
        return self.classification_loss(logits, labels, extras)

    def assignment_labels(self, images: Tensor, labels: Tensor) -> Tensor:
        """Classes (B,) under which the memory bank files the images."""
        return labels


class HeldNearAdapter(HostAdapter):
    """A host whose texts are held near frozen ones, ``model.prompt_learner.text_features`` (C, d).

    similarity_weight: of the loss that holds them there (upstream's code has 8 for CLIPFit, the paper for KgCoOp).
    """

    def __init__(self, model, class_names=None, similarity_weight: float = 8.0):
        self.similarity_weight = similarity_weight
        super().__init__(model, class_names)

    def objective(self, logits: Tensor, labels: Tensor, extras: dict) -> Tensor:
        """Cross entropy, and the host's own loss 1 - mean cos(text, frozen text)."""
        similarity = F.cosine_similarity(extras["text"].float(), self.model.prompt_learner.text_features.float()).mean()
        return self.classification_loss(logits, labels, extras) + self.similarity_weight * (1 - similarity)


class CLIPAdapter(HostAdapter):
    """A CLIP as its library gives it: the class names in a hand-written prompt are its classes.

    Args:
        template: the prompt, with {} where a class name goes.
        tokenizer: makes ids (C, T) of a list of texts; the library's own for this model if None.

    Raises:
        ValueError: there are no class names, or no tokenizer is found.
    """

    def __init__(self, model, class_names=None, template: str = "a photo of a {}.", tokenizer: Callable | None = None):
        if not class_names:
            raise ValueError("a plain CLIP knows no classes: pass class_names=[...]")
        super().__init__(model, class_names)
        self.template, self._tokenizer = template, tokenizer or self.find_tokenizer(model)
        self.tokens = self._ids(template)  # (C, T)

    @staticmethod
    def find_tokenizer(model: nn.Module) -> Callable:
        """The model's own tokenizer, list of texts → ids (C, T)."""
        raise NotImplementedError

    @property
    def n_classes(self) -> int:
        return len(self.tokens)

    def encode_text(self) -> Tensor:
        return self._encode(self.tokens)

    @torch.no_grad()
    def templates(self) -> Tensor:
        """The mean over hand-written templates, the prompt among them, unless others were given: (C, d)."""
        if self._templates is not None:
            return super().templates()
        ids = map(self._ids, dict.fromkeys((self.template, *GENERAL)))
        return F.normalize(sum(F.normalize(self._encode(each).float(), dim=-1) for each in ids), dim=-1)

    def encode_tokens(self, ids: Tensor) -> Tensor:
        """Embeddings (C, d) of ids (C, T), not normalized."""
        return self.model.encode_text(ids)

    def _ids(self, template):
        return self._tokenizer([template.format(name.replace("_", " ")) for name in self.class_names])  # (C, T)

    def _encode(self, tokens):
        chunks = tokens.to(self.logit_scale.device).split(TEXT_CHUNK)
        return torch.cat([self.encode_tokens(ids) for ids in chunks])
