"""Any model with an image encoder and a text encoder: its own forward is run, and what the two returned is taken."""

import threading
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..method.layout import layout_of
from ..towers.prompts import CLIPClassifier
from .base import HostAdapter

IMAGE, TEXT = "image_encoder", "text_encoder"


class GenericAdapter(HostAdapter):
    """The host is trained by its own step and classifies by its own forward, on the tokens that are kept.

    Args:
        forward: images (B, 3, h, w) → logits (B, C) or a tuple with them; the model itself if None.

    Raises:
        ValueError: there is no vision transformer, or no class names.
    """

    name = "generic"
    looks_for = f"{IMAGE} with a vision transformer inside, and {TEXT} (and class_names)"
    gives_logits = True
    hand_written_text = False

    def __init__(self, model, class_names=None, forward: Callable | None = None):
        self.forward, self._text = forward, None
        if not class_names:
            raise ValueError(f"{type(model).__name__} is known by its {IMAGE} alone: pass class_names=[...]")
        super().__init__(model, class_names)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return _named(model, IMAGE) is not None and _named(model, TEXT) is not None

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    @property
    def vision(self) -> nn.Module:
        """The first module in the image encoder that is a vision transformer; the model itself, taken apart."""
        inside = _named(self.model, IMAGE)
        for module in (self.model if inside is None else inside).modules():
            try:
                return layout_of(module).vision
            except ValueError:
                continue
        return self.model if inside is None else inside

    @property
    def logit_scale(self) -> Tensor:
        """1/τ, a scalar; 100 where the host keeps none."""
        scale = getattr(self.model, "logit_scale", None)
        return scale.exp() if isinstance(scale, Tensor) else torch.tensor(100.0, device=self.layout.device)

    def encode_text(self) -> Tensor:
        """What the text encoder returned in a forward on a blank image, or when it was last asked: (C, d).

        A host of ours is asked for its texts. Zeros where there is no row for each class; nothing that reads texts may
        be in use then.
        """
        if isinstance(self.model, CLIPClassifier):
            return self.model.text_features()
        blank = torch.zeros(1, 3, *self.layout.image_size, device=self.layout.device)
        self._run(blank)
        return torch.zeros(self.n_classes, self.dim, device=blank.device) if self._text is None else self._text

    def encode_image(self, images: Tensor) -> Tensor:
        return self.classify(images)[0]

    def classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(images)

    def host_logits(self, images: Tensor) -> Tensor:
        return self._run(images)[1]

    def _run(self, images):
        seen = {}
        encoder = _named(self.model, IMAGE)
        encoder = self.vision if encoder is None else encoder
        with _listening(encoder, seen, "image"), _listening(_named(self.model, TEXT), seen, "text"):
            output = (self.forward or self.model)(images)
        logits = _of_shape(output, len(images), self.n_classes)
        if logits is None:
            raise ValueError(
                f"{type(self.model).__name__} gives no logits of {self.n_classes} classes "
                f"({_shapes(output)}): is it in evaluation mode? Otherwise pass GenericAdapter a forward=…"
            )
        text = _of_shape(seen.get("text"), self.n_classes)
        self._text = self._text if text is None else text.detach()
        image = _of_shape(seen.get("image"), len(images))
        if image is None:  # PLOT's tower sees each image several times, (M, B, d)
            several = (each for each in _tensors(seen.get("image")) if each.dim() == 3 and each.shape[1] == len(images))
            image = next((each.mean(0) for each in several), None)
        return logits if image is None else image, logits


@contextmanager
def _listening(module, seen, name):
    """Note what a module returns to this thread."""
    if module is None:
        yield
        return
    thread = threading.get_ident()

    def note(module, args, output):
        if threading.get_ident() == thread:
            seen[name] = output

    handle = module.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _named(model, name):
    """The submodule of that name, at whatever depth; None if there is none."""
    return next((module for path, module in model.named_modules() if path.split(".")[-1] == name), None)


def _of_shape(output, rows, columns=None):
    """The first tensor (rows, columns) in a host's output, of any columns if not given; None if there is none."""
    for each in _tensors(output):
        if each.dim() == 2 and len(each) == rows and columns in (None, each.shape[1]) and each.is_floating_point():
            return each
    return None


def _tensors(output):
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else [output]
    return [value for value in values if isinstance(value, Tensor)]


def _shapes(output):
    return ", ".join(str(tuple(each.shape)) for each in _tensors(output)) or type(output).__name__
