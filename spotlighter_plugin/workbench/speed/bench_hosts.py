"""Hosts with random weights on a CLIP of any shape, for `spotlighter bench`: speed does not depend on the values."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from clip.model import CLIP
from torch import nn

from ...method.token_stream import hidden_of, with_hidden
from ...towers.clip import apply_precision
from ...towers.prompts import normalize
from ..training.settings import import_trainers_and_datasets

HOSTS = ("coop", "maple", "promptkd", "clipfit")
DTYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Shape:
    """A CLIP of OpenAI's architecture: pixels, patch, width and depth of the towers, joint width."""

    image: int = 224
    patch: int = 16
    width: int = 768
    layers: int = 12
    dim: int = 512
    text_width: int = 512
    text_layers: int = 12

    @property
    def tokens(self) -> int:
        """N, patch tokens per image."""
        return (self.image // self.patch) ** 2


SHAPES = {
    "ViT-B/16": Shape(),
    "ViT-B/32": Shape(patch=32),
    "ViT-L/14": Shape(patch=14, width=1024, layers=24, dim=768, text_width=768),
    "ViT-L/14@336px": Shape(image=336, patch=14, width=1024, layers=24, dim=768, text_width=768),
    "micro": Shape(image=112, patch=8, width=64, layers=12, dim=128, text_width=128, text_layers=4),
    "tiny": Shape(image=112, patch=8, width=128, layers=12, dim=128, text_width=128, text_layers=4),
}


def shape_of(name: str) -> Shape:
    """The shape of a name, or of `width=384,layers=6,patch=8,image=96`, where what is left out is ViT-B/16's.

    Raises:
        ValueError: one line, for an unknown name or a shape that no CLIP has.
    """
    if name in SHAPES:
        return SHAPES[name]
    known = [field.name for field in fields(Shape)]
    pairs = re.findall(r"(\w+)=(\d+)(?:,|$)", name)
    if not pairs or ",".join(f"{key}={value}" for key, value in pairs) != name or {k for k, _ in pairs} - set(known):
        raise ValueError(
            f"--backbone {name!r} is unknown: take {', '.join(SHAPES)}, or numbers for {', '.join(known)} "
            "as in width=384,layers=6,patch=8,image=96"
        )
    shape = replace(SHAPES["ViT-B/16"], **{key: int(value) for key, value in pairs})
    for key in known:
        if not getattr(shape, key):
            raise ValueError(f"--backbone {name}: {key} is 0, must be at least 1")
    for key in ("width", "text_width"):
        if getattr(shape, key) % 64:
            raise ValueError(f"--backbone {name}: {key} is {getattr(shape, key)}, must be a multiple of 64 (a head)")
    if shape.image % shape.patch:
        raise ValueError(f"--backbone {name}: image {shape.image} is no multiple of patch {shape.patch}")
    return shape


def build_host(
    host: str, shape: Shape, classes: int, dtype: str = "fp32", device="cpu", teacher: Shape | None = None
) -> nn.Module:
    """A host's model as its trainer makes it: random weights, evaluation mode, requires_grad as in training.

    classes: C. dtype: fp32, fp16 (as OpenAI casts: LayerNorm and embeddings stay float32), or bf16 in fp16's place.
    teacher: shape of PromptKD's teacher (default: the student's own).
    """
    if host not in HOSTS:
        raise ValueError(f"--host {host!r} is unknown: take {', '.join(HOSTS)}")
    from dassl.config import get_cfg_default

    modules = {module.__name__.rpartition(".")[2]: module for module in import_trainers_and_datasets()}
    module, cfg, clip_model = modules[host], get_cfg_default(), _random_clip(shape, dtype, device)
    module.extend_cfg(cfg)
    names = [f"class {number}" for number in range(classes)]
    if host == "clipfit":
        model = module.CustomCLIP([f"a photo of a {name}." for name in names], clip_model)
    elif host == "promptkd":
        taught_by = _random_clip(teacher or shape, dtype, device)
        depths = (min(9, tower.layers) for tower in (taught_by.transformer, taught_by.visual.transformer))
        teacher_model = modules["promptsrc"].CustomCLIP(names, taught_by, 4, 4, *depths, "a photo of a")
        teacher_model.requires_grad_(False).to(device).eval()
        model = module.CustomCLIP(clip_model, teacher_model, 4, min(9, shape.layers))
    else:
        model = module.CustomCLIP(cfg, names, clip_model)
    return model.to(device).eval()


def text_owner(host: nn.Module) -> nn.Module:
    """The model whose texts the host classifies with: PromptKD's teacher, or the host itself."""
    return getattr(host, "teacher", host)


def logits_of(host: nn.Module, images: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The host's own logits (B, C) on texts (C, d) that were encoded before."""
    return host.logit_scale.exp() * normalize(host.encode_image(images)) @ text.t()


def upstream_logits(host: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What upstream's code computes for a batch: texts at full length every time, with PromptKD the whole teacher."""
    owner = text_owner(host)
    with _full_length(owner):
        text = normalize(owner.encode_text())  # (C, d)
    if owner is not host:
        logits_of(owner, images, text)
    return logits_of(host, images, text)


@contextmanager
def texts_alone(host: nn.Module) -> Iterator[None]:
    """Let the host encode every text by itself, cut at the longest's end, as this repository did before texts shared
    their beginning; upstream's code has all 77 positions beside."""
    learner = text_owner(host).prompt_learner
    shared, learner.shared = getattr(learner, "shared", 1), 1
    try:
        yield
    finally:
        learner.shared = shared


@contextmanager
def sliced(blocks: list[nn.Module], lengths: list[int]) -> Iterator[None]:
    """Leave off the last positions of what enters the blocks, (S, B, w), until each sees as many as ``lengths``, an
    entry a block, say: the least that any choice of so many tokens takes, for a host alone."""

    def hook(fewer):
        return lambda block, args: (with_hidden(args[0], hidden_of(args[0])[: -fewer or None]), *args[1:])

    pairs = zip(blocks[1:], pairwise(lengths), strict=True)
    handles = [block.register_forward_pre_hook(hook(before - after)) for block, (before, after) in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _full_length(owner):
    """Let the text tower run on all 77 positions of all classes at once, as upstream's does."""
    tower = owner.text_encoder if hasattr(owner, "text_encoder") else owner.prompt_learner.text_encoder

    def encode(prompts, tokenized, shared=1):
        hidden = prompts + tower.positional_embedding.to(prompts.dtype)  # (C, 77, w)
        hidden = tower.transformer(hidden.transpose(0, 1))  # (77, C, w)
        ends = tokenized.argmax(-1).to(hidden.device)  # (C,)
        return tower.ln_final(hidden[ends, torch.arange(len(ends), device=ends.device)]) @ tower.text_projection

    tower.forward = encode
    try:
        yield
    finally:
        del tower.forward


def _random_clip(shape, dtype, device):
    model = CLIP(
        shape.dim, shape.image, shape.layers, shape.width, shape.patch,
        77, 49408, shape.text_width, shape.text_width // 64, shape.text_layers,
    )  # fmt: skip
    apply_precision(model, dtype)
    return model.requires_grad_(False).to(device).eval()
