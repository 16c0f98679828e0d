"""The text side that every prompted CLIP shares: learned context words, the text tower on them, cached embeddings."""

from __future__ import annotations

import itertools

import torch
from clip.clip import _tokenizer
from clip.model import CLIP
from torch import nn

from .clip import encode_tokens, tokenize
from .packing import common_prefix

POSITIONS = ("end", "middle", "front")


class TextEncoder(nn.Module):
    """CLIP's text tower on given token embeddings (C, 77, w): embeddings of the classes (C, d), not normalized.

    shared: how many leading positions are the same for all classes, as ``PromptLearner.shared`` says.
    beginnings: (B, shared, w), what stands in these positions instead, B times over: embeddings (B, C, d).
    """

    def __init__(self, clip_model: CLIP):
        super().__init__()
        self.transformer = clip_model.transformer
        self.positional_embedding = clip_model.positional_embedding
        self.ln_final = clip_model.ln_final
        self.text_projection = clip_model.text_projection

    def forward(
        self,
        prompts: torch.Tensor,
        tokenized_prompts: torch.Tensor,
        shared: int = 1,
        beginnings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return encode_tokens(self, prompts, tokenized_prompts, shared, beginnings)


class PromptLearner(nn.Module):
    """Learned context vectors around the class names' own token embeddings.

    n_ctx: number of context vectors (0: as many as ctx_init has tokens); ctx_init: words to start from (those beyond
    the first n_ctx stay as they are; with fewer than n_ctx it is left out, in one line); per_class: one for each class;
    position: where the class name stands, "end", "middle" or "front". Calling it gives token embeddings (C, 77, w).
    """

    def __init__(self, class_names, clip_model, n_ctx, ctx_init="", per_class=False, position="end"):
        super().__init__()
        if position not in POSITIONS:
            raise ValueError(f"CLASS_TOKEN_POSITION {position!r} is unknown: choose one of {', '.join(POSITIONS)}")
        if n_ctx < 1 and not ctx_init:
            raise ValueError(f"N_CTX {n_ctx} is below 1: set N_CTX, or CTX_INIT")
        names = [name.replace("_", " ") for name in class_names]
        copies = [len(names)] if per_class else []
        ctx, opening = self._initial_context(clip_model, n_ctx, ctx_init.replace("_", " "), copies)
        self.ctx = nn.Parameter(ctx.type(clip_model.dtype))  # (n_ctx, w) or (C, n_ctx, w)

        self.n_cls, self.n_ctx = len(names), ctx.shape[-2]
        self.tokenized_prompts = tokenize([f"{opening} {name}." for name in names])  # (C, 77)
        device = clip_model.token_embedding.weight.device
        with torch.no_grad():
            embeddings = clip_model.token_embedding(self.tokenized_prompts.to(device)).type(clip_model.dtype)
        # saved with the checkpoint, but never loaded: they belong to the present class names
        self.register_buffer("token_prefix", embeddings[:, :1])  # (C, 1, w) start of text
        self.register_buffer("token_suffix", embeddings[:, 1 + self.n_ctx :])  # (C, 76 - n_ctx, w) name, end, padding
        self.register_buffer("order", self._order(names, position), persistent=False)  # (C, 77) or None
        alike = {"front": 1, "middle": 1 + self.n_ctx // 2, "end": common_prefix(self.tokenized_prompts)}
        self.shared = 1 if per_class else alike[position]  # leading positions of which all classes have the same

    @staticmethod
    def _initial_context(clip_model, n_ctx, ctx_init, copies):
        words = len(_tokenizer.encode(ctx_init))
        if n_ctx > words:
            if ctx_init:
                print(f"Note: CTX_INIT {ctx_init!r} is {words} tokens and N_CTX {n_ctx}: left out, contexts are drawn")
            width = clip_model.ln_final.weight.shape[0]
            return torch.randn(*copies, n_ctx, width) * 0.02, " ".join(["X"] * n_ctx)
        n_ctx = n_ctx or words
        ids = tokenize([ctx_init]).to(clip_model.token_embedding.weight.device)
        with torch.no_grad():
            return clip_model.token_embedding(ids)[0, 1 : 1 + n_ctx].repeat(*copies, 1, 1), ctx_init

    def _order(self, names, position):
        """Where each position of the prompt comes from when [start, context, name, rest] is rearranged: (C, 77)."""
        if position == "end":
            return None
        before = {"front": 0, "middle": self.n_ctx // 2}[position]  # context vectors in front of the name
        name = torch.tensor([len(_tokenizer.encode(n)) for n in names])[:, None]  # (C, 1) tokens of the name
        here = torch.arange(self.tokenized_prompts.shape[1])[None]  # (1, 77)
        in_name = (here > before) & (here <= before + name)
        after_name = (here > before + name) & (here <= self.n_ctx + name)
        order = torch.where(in_name, here + self.n_ctx - before, here.expand(len(names), -1))
        return torch.where(after_name, here - name, order)

    def forward(self) -> torch.Tensor:
        ctx = self.ctx.expand(self.n_cls, -1, -1)  # (C, n_ctx, w)
        prompts = torch.cat([self.token_prefix, ctx, self.token_suffix], dim=1)  # (C, 77, w)
        if self.order is None:
            return prompts
        return prompts.gather(1, self.order[..., None].expand_as(prompts))


class CLIPClassifier(nn.Module):
    """A CLIP classifier over class names: what all hosts here share.

    A host has image_encoder (CLIP's image tower) and logit_scale, and says how its texts are encoded.
    cache_text: without gradient, keep the text embeddings until a parameter changes; False runs the text tower on
    every batch, as upstream does.
    """

    cache_text = True
    _cached = (None, None)

    @property
    def dtype(self) -> torch.dtype:
        return self.image_encoder.conv1.weight.dtype

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, d), not normalized. Autograd keeps nothing before the first trained parameter."""
        return self.image_encoder(image.type(self.dtype))

    def encode_text(self) -> torch.Tensor:
        """Embeddings of the classes at present, (C, d), not normalized."""
        raise NotImplementedError

    def text_features(self) -> torch.Tensor:
        """Normalized embeddings of the classes at present, (C, d)."""
        if torch.is_grad_enabled() or not self.cache_text:
            return normalize(self.encode_text())
        tensors = itertools.chain(self.parameters(), self.buffers())
        state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if self._cached[0] != state:
            with torch.autocast(self.logit_scale.device.type, enabled=False):  # kept for calls outside of it, too
                self._cached = (state, normalize(self.encode_text()))
        return self._cached[1]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> logits (B, C)."""
        image_features = normalize(self.encode_image(image))  # (B, d)
        return self.logit_scale.exp() * image_features @ self.text_features().t()


class PromptedCLIP(CLIPClassifier):
    """A classifier whose texts come from a prompt_learner (with tokenized_prompts); upstream's field names."""

    def __init__(self, clip_model: CLIP, prompt_learner: nn.Module):
        super().__init__()
        self.prompt_learner = prompt_learner
        self.tokenized_prompts = prompt_learner.tokenized_prompts
        self.image_encoder = clip_model.visual
        self.text_encoder = TextEncoder(clip_model)
        self.logit_scale = clip_model.logit_scale

    def encode_text(self) -> torch.Tensor:
        return self.text_encoder(self.prompt_learner(), self.tokenized_prompts, self.prompt_learner.shared)


def normalize(features: torch.Tensor) -> torch.Tensor:
    """Unit length along the last dimension."""
    return features / features.norm(dim=-1, keepdim=True)
