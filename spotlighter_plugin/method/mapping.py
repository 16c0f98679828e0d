"""IRM and TRM, Eq. 8-11: prototypes refined by the kept tokens, texts refined by the kept tokens.

A ``Mapping`` holds what the plug-in trains. Each of its paths starts at zero, so training starts at the host.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import Layout

HEAD = 64  # width of an attention head in CLIP


@dataclass
class FactoredText:
    """Texts t^rep_bc ∝ base_c + Σ_j weights_bcj mix_bj, never written out as (B, C, d).

    base: (C, d); mix: (B, k, d) and weights: (B, C, k), or both None where texts do not depend on the image.
    """

    base: Tensor
    mix: Tensor | None = None
    weights: Tensor | None = None

    def cosine(self, image: Tensor) -> Tensor:
        """cos(v_b, t^rep_bc): (B, d) → (B, C), from v·base, v·mix, base·mix and the mixes' Gram matrix alone."""
        base, mix = self.base, self.mix
        image = F.normalize(image, dim=-1)
        if mix is None:
            return image @ F.normalize(base, dim=-1).T
        dot = image @ base.T + torch.einsum("bck,bk->bc", self.weights, torch.einsum("bkd,bd->bk", mix, image))
        return dot / self._norms()

    def mean(self) -> Tensor:
        """mean_b normalize(t^rep_bc): (C, d)."""
        if self.mix is None:
            return F.normalize(self.base, dim=-1)
        inverse = 1 / self._norms()  # (B, C)
        mixed = torch.einsum("bck,bkd->cd", self.weights * inverse.unsqueeze(-1), self.mix)
        return (inverse.sum(0).unsqueeze(-1) * self.base + mixed) / len(self.mix)

    def _norms(self) -> Tensor:
        base, mix = self.base, self.mix
        cross = torch.einsum("bck,bkc->bc", self.weights, mix @ base.T)
        gram = mix @ mix.transpose(1, 2)  # (B, k, k)
        within = (self.weights @ gram * self.weights).sum(-1)  # (B, C)
        square = base.square().sum(-1) + 2 * cross + within
        return square.clamp(min=1e-12).sqrt()


@dataclass
class DenseText:
    """Texts (B, C, d), for a mapping that makes a text of its own for each image."""

    text: Tensor

    def cosine(self, image: Tensor) -> Tensor:
        return torch.einsum("bcd,bd->bc", F.normalize(self.text, dim=-1), F.normalize(image, dim=-1))

    def mean(self) -> Tensor:
        return F.normalize(self.text, dim=-1).mean(0)


def match_texts(text: Tensor, tokens: Tensor, scale: Tensor | float) -> Tensor:
    """A_cj = softmax_j(cos(t_c, z_j)/τ), Eq. 4 between texts and kept tokens: (C, d), (B, k, d) → (B, C, k)."""
    return (scale * torch.einsum("cd,bkd->bck", text, tokens)).softmax(-1)


class LinearTRM(nn.Module):
    """t^rep_c = t_c + α Linear([t_c ; Σ_j A_cj z_j]), Eq. 11, with Linear starting at zero."""

    def __init__(self, dim: int, alpha: float):
        super().__init__()
        self.alpha = alpha
        self.linear = _zero(nn.Linear(2 * dim, dim))

    def forward(self, text: Tensor, tokens: Tensor, scale) -> FactoredText:
        own, mixed = self.linear.weight.chunk(2, dim=1)  # (d, d) each
        base = text + self.alpha * F.linear(text, own, self.linear.bias)  # (C, d)
        return FactoredText(base, self.alpha * F.linear(tokens, mixed), match_texts(text, tokens, scale))


class TransformerTRM(nn.Module):
    """Table XI's costly variant: a transformer layer in which texts look at the kept tokens, added with weight α."""

    def __init__(self, dim: int, alpha: float):
        super().__init__()
        self.alpha = alpha
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, max(dim // HEAD, 1), batch_first=True)
        self.feed_forward = _feed_forward(dim, 4 * dim)
        _zero(self.attention.out_proj)

    def forward(self, text: Tensor, tokens: Tensor, scale) -> DenseText:
        query = self.norm(text).expand(len(tokens), -1, -1)  # (B, C, d)
        attended = self.attention(query, tokens, tokens, need_weights=False)[0]
        residual = attended + self.feed_forward(self.norm(text + attended))
        return DenseText(text + self.alpha * residual)


class FrozenAttentionIRM(nn.Module):
    """Eq. 8 with block s's own attention, and Eq. 9 with a trained FFN that starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        # 7/4 of the width gives, with Eq. 11's Linear, 2.6 M parameters on ViT-B/16.
        self.feed_forward = _feed_forward(width, 7 * width // 4)

    def forward(self, prototypes: Tensor, tokens: Tensor, layout: Layout, block: int) -> Tensor:
        """U_c* (P, B, w) and tokens (k, B, w) → Û (P, B, w)."""
        seen = layout.attentions[block](layout.ln_1(block, prototypes), layout.ln_1(block, tokens))
        refined = prototypes + seen  # T, Eq. 8
        ffn = self.feed_forward(layout.ln_2(block, refined).to(self.feed_forward[0].weight.dtype))
        return refined + ffn.to(refined.dtype)  # Eq. 9


class TransformerIRM(nn.Module):
    """Eq. 8 and 9 with an attention and an FFN of their own, both trained."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads)
        self.feed_forward = _feed_forward(width, 4 * width)
        _zero(self.attention.out_proj)

    def forward(self, prototypes: Tensor, tokens: Tensor, layout: Layout, block: int) -> Tensor:
        own = self.attention.in_proj_weight.dtype
        keys = layout.ln_1(block, tokens).to(own)
        refined = prototypes.to(own)
        refined = refined + self.attention(layout.ln_1(block, prototypes).to(own), keys, keys, need_weights=False)[0]
        return (refined + self.feed_forward(layout.ln_2(block, refined))).to(prototypes.dtype)


class LinearIRM(nn.Module):
    """Table XI's light variant: Û = U + Linear(mean of the kept tokens)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = _zero(nn.Linear(width, width))

    def forward(self, prototypes: Tensor, tokens: Tensor, layout: Layout, block: int) -> Tensor:
        mean = layout.ln_1(block, tokens).mean(0, keepdim=True).to(self.linear.weight.dtype)  # (1, B, w)
        return prototypes + self.linear(mean).to(prototypes.dtype)


class Mapping(nn.Module):
    """What the plug-in trains: IRM and TRM as ``config.mapping`` names them, and α_v.

    Args:
        width: w of the vision tower.
        dim: d of the joint space.
        heads: H of the tower.

    Attributes:
        irm: module, or None.
        trm: module, or None.
        readout_weight: α_v, weight of π(Û) beside π(CLS), a scalar that starts at 0, or None.
    """

    def __init__(self, config, width: int, dim: int, heads: int):
        super().__init__()
        image, text = _kinds(config.mapping)
        uses_irm = image is not None and config.prototypes_in != "none"
        self.irm = image(width, heads) if uses_irm else None
        self.trm = text(dim, config.alpha) if text is not None else None
        self.readout_weight = nn.Parameter(torch.zeros(())) if uses_irm else None

    def text(self, text: Tensor, tokens: Tensor, scale) -> FactoredText | DenseText:
        """t^rep for texts (C, d) and the kept tokens (B, k, d), both of unit length."""
        return FactoredText(text) if self.trm is None else self.trm(text, tokens, scale)


def _kinds(mapping: str):
    """How IRM (width, heads) and TRM (dim, alpha) are made, by the name of the mapping."""
    images = {
        "none": None,
        "full": lambda width, heads: FrozenAttentionIRM(width),
        "linear": lambda width, heads: LinearIRM(width),
        "transformer": TransformerIRM,
    }
    texts = {"none": None, "full": LinearTRM, "linear": LinearTRM, "transformer": TransformerTRM}
    image, _, text = mapping.partition("+")
    return images[image], texts[text or image]


def _feed_forward(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), _zero(nn.Linear(hidden, width)))


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
