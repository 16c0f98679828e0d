"""Which tokens matter: sample-wise and semantic-wise scores, and the k tokens that they light up.

Pure functions of tensors. Hidden states are in PyTorch's (length, batch, width) order, as CLIP's blocks pass them;
everything else has the batch first. Scores are (B, N) in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Gaze


def expected_text(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """t̂ = Σ_c p_c t_c, p = softmax_c(cos(image, t_c)/τ): (B, d) and (C, d), both of unit length → (B, d)."""
    return (scale * image @ text.T).softmax(-1) @ text


def attention_score(hidden: Tensor, gaze: Gaze, bias: Tensor | None = None) -> Tensor:
    """How much is looked at each position, mean over heads: (S, B, w) → (B, S).

    Keys are not formed: each head's query is taken back through W_k first. In the weights' precision, softmax in
    float32.

    Args:
        gaze: who looks, ``Layout.gaze``.
        bias: (B, S), what attention adds to its logits.
    """
    plain = gaze.plain(hidden)
    query = F.linear(gaze.query_of(plain), *gaze.asking).unflatten(-1, (len(gaze.asked), -1))  # (B, H, w/H)
    # q·(W_k x + b_k) = (W_kᵀ q)·x + constant, and softmax does not see the constant.
    folded = torch.einsum("bhe,hew->bhw", query, gaze.asked)  # (B, H, w)
    logits = torch.einsum("bhw,sbw->bhs", folded, plain)  # (B, H, S)
    if bias is not None:
        logits = logits + bias.unsqueeze(1)
    return logits.softmax(-1, dtype=torch.float32).mean(1)  # (B, S)


def lens_score(tokens: Tensor, target: Tensor) -> Tensor:
    """Σ_c p_c cos(z_i, t_c) = z_i·t̂: the sample-wise score as the paper words it. (B, N, d), (B, d) → (B, N)."""
    return torch.einsum("bnd,bd->bn", tokens, target)


def random_score(keys: Tensor, n_tokens: int, seed: int = 0) -> Tensor:
    """Scores in [0, 1) that depend on nothing but the image's key, the position and the seed: (B,) int64 → (B, N)."""
    position = torch.arange(1, n_tokens + 1, device=keys.device)
    mixed = keys.unsqueeze(-1) * 0x9E3779B1 + position * 0x85EBCA77 + (seed + 1) * 0xC2B2AE3D  # (B, N), int64 wraps
    for _ in range(2):
        mixed = (mixed ^ ((mixed >> 15) & 0x1FFFFFFFF)) * 0x2C1B3C6D
    return ((mixed >> 16) & 0xFFFFFF).float() / 0x1000000


def image_keys(images: Tensor) -> Tensor:
    """One integer per image from its pixels, the same in whatever batch it comes: (B, 3, h, w) → (B,) int64."""
    return (images.flatten(1).double().square().mean(-1) * 1e9).long()


def match_category(cls: Tensor, prototypes: Tensor, filled: Tensor) -> Tensor:
    """c* = argmax_c cos(π(h_CLS), mean_p π(U_c,p)) over classes with a prototype, Eq. 3.

    Args:
        cls: π(h_CLS), (B, d).
        prototypes: π(U), (C, P, d), unit length.
        filled: (C, P), which prototypes exist; at least one.

    Returns:
        c*, (B,) int64.
    """
    present = filled.unsqueeze(-1).to(prototypes.dtype)  # (C, P, 1)
    centre = F.normalize((prototypes * present).sum(1), dim=-1)  # (C, d); the mean's direction
    similarity = (cls @ centre.T).masked_fill(~filled.any(-1), -torch.inf)  # (B, C)
    return similarity.argmax(-1)


def semantic_score(tokens: Tensor, prototypes: Tensor, filled: Tensor, target: Tensor, scale: Tensor | float) -> Tensor:
    """Σ_p ω_p cos(z_i, π(U_c*,p)), ω = softmax_p(cos(π(U_c*,p), t̂)/τ): prototypes seen from image and text.

    Args:
        tokens: z, (B, N, d).
        prototypes: π(U_c*), (B, P, d), those of each image's category.
        filled: (B, P), at least one per image.
        target: t̂, (B, d).
        scale: 1/τ.
    """
    toward_text = scale * torch.einsum("bpd,bd->bp", prototypes, F.normalize(target, dim=-1))  # (B, P)
    omega = toward_text.masked_fill(~filled, -torch.inf).softmax(-1)
    return torch.einsum("bnd,bpd,bp->bn", tokens, prototypes, omega)


def standardise(scores: Tensor) -> Tensor:
    """z-score per image; equal scores become zeros: (B, N) → (B, N)."""
    scores = scores.float()
    centred = scores - scores.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).sqrt()
    rounding = 4 * torch.finfo(torch.float32).eps * scores.abs().amax(-1, keepdim=True)  # a mean of equals may be off
    return torch.where(spread > rounding, centred / spread.clamp(min=1e-12), 0.0)


def top_tokens(scores: Tensor, k: int) -> Tensor:
    """tok^act: indices of the k highest scores, best first; of equal scores the lower index wins. (B, N) → (B, k)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def fuse_dropped(tokens: Tensor, scores: Tensor, kept: Tensor) -> Tensor:
    """One token for all that are not kept, Σ_i ω_i h_i with ω = softmax of their scores: (1, B, w).

    Args:
        tokens: h, (n, B, w).
        scores: standardised, (B, n).
        kept: indices (B, k) in 0…n-1, fewer than n.
    """
    omega = scores.scatter(1, kept, -torch.inf).softmax(-1)  # (B, n)
    return torch.einsum("bn,nbw->bw", omega.to(tokens.dtype), tokens).unsqueeze(0)


def split_levels(kept: Tensor, levels: str = "1+2") -> Tensor:
    """Level ``1``, the upper half of the ordered tokens (the larger one if k is odd), level ``2``, the rest, or all."""
    upper = (kept.shape[1] + 1) // 2
    return {"1": kept[:, :upper], "2": kept[:, upper:], "1+2": kept}[levels]
