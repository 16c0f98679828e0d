"""What the plug-in asks of a host, and the answers that most CLIP prompt-tuning hosts share."""

import torch.nn.functional as F
from torch import Tensor, nn


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

    def __init__(self, model: nn.Module, class_names: list[str] | None = None):
        self.model = model
        self.class_names = list(class_names or map(str, range(self.n_classes)))
        self._frozen_text = None

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether ``model`` is this kind of host; never, for an adapter that its caller hands over."""
        return False

    @property
    def n_classes(self) -> int:
        return len(self.model.tokenized_prompts)

    @property
    def vision(self) -> nn.Module:
        """The vision transformer, in OpenAI's layout."""
        return self.model.image_encoder

    @property
    def logit_scale(self) -> Tensor:
        """1/τ, a scalar."""
        return self.model.logit_scale.exp()

    def encode_text(self) -> Tensor:
        """Embeddings (C, d) of the host's present prompts, with gradient if they are trained, not normalized."""
        raise NotImplementedError

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings (B, d) of images (B, 3, h, w) through the host's own path, not normalized."""
        return self.vision(images.type(self.model.dtype))

    def project(self, joint: Tensor) -> Tensor:
        """From the tower's joint space to that of the texts (…, d); not the same where the host adds a projection."""
        return joint

    @property
    def dim(self) -> int:
        """d, width of the texts' space."""
        vision = self.vision
        return self.project(vision.proj.detach()[:1]).shape[-1]

    def set_frozen_text(self, text: Tensor) -> None:
        """Give t⁰: text embeddings (C, d) of the hand-written prompts through the frozen CLIP, of unit length."""
        self._frozen_text = text.detach().float()

    def frozen_text(self) -> Tensor:
        """t⁰ (C, d), unit length, no gradient. Where nobody gave it: the host's prompts at the first call."""
        if self._frozen_text is None:
            self.set_frozen_text(F.normalize(self.encode_text().detach().float(), dim=-1))
        self._frozen_text = self._frozen_text.to(self.logit_scale.device)
        return self._frozen_text

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
