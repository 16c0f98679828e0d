"""The match with the memory bank: what the shots looked like, as evidence beside the texts.

The bank holds the shots themselves, so their own match says nothing about that of other images: training leaves the
match out, and ``choose`` weighs it on held-out images.
"""

from itertools import product

import torch
from torch import Tensor

SHARPNESSES = (3.0, 5.5, 10.0, 20.0)
SHARES = (0.25, 0.5, 1.0)
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0)
CHUNK = 2**24  # cosines held at once


def image_match(image: Tensor, prototypes: Tensor, filled: Tensor, sharpness: float) -> Tensor:
    """mean_p exp(-b (1 - cos(v, V_c,p))) over the prototypes that exist, around its mean over the classes.

    Args:
        image: v, (B, d), unit length.
        prototypes: (C, P, d), unit length.
        filled: (C, P).
        sharpness: b.

    Returns:
        (B, C); 0 for classes without prototypes.
    """
    cosine = torch.einsum("bd,cpd->bcp", image, prototypes)
    votes = torch.exp(-sharpness * (1 - cosine)) * filled
    return _centred(votes.sum(-1) / filled.sum(-1).clamp(min=1), filled.any(-1))


def token_match(tokens: Tensor, prototypes: Tensor, filled: Tensor, sharpness: float) -> Tensor:
    """mean_i max_p exp(-b (1 - cos(h_i, U_c,p))), around its mean over the classes; classes go through in chunks.

    Args:
        tokens: (B, k, w), unit length.
        prototypes: (C, P, w), unit length.
        filled: (C, P).
        sharpness: b.

    Returns:
        (B, C); 0 for classes without prototypes.
    """
    step = max(1, CHUNK // (tokens.shape[0] * tokens.shape[1] * prototypes.shape[1]))
    parts = []
    for some, exist in zip(prototypes.split(step), filled.split(step), strict=True):
        cosine = torch.einsum("bkd,cpd->bkcp", tokens, some).masked_fill(~exist, -torch.inf)
        parts.append(torch.exp(-sharpness * (1 - cosine.amax(-1))).mean(1))
    return _centred(torch.cat(parts, dim=1), filled.any(-1))


def _centred(match: Tensor, present: Tensor) -> Tensor:
    return (match - (match * present).sum(-1, keepdim=True) / present.sum().clamp(min=1)) * present


def choose(logits: Tensor, labels: Tensor, images: list[Tensor], tokens: list[Tensor]) -> tuple[float, Tensor, float]:
    """The weight and the shape of the match with which most held-out images are right; of equals the lightest.

    Args:
        logits: (n, C), from the texts alone.
        labels: (n,).
        images: ``image_match`` at each of ``SHARPNESSES``, (n, C) each; empty where it is not used.
        tokens: ``token_match`` likewise.

    Returns:
        The weight, the shape (4,) as in ``Plugin.shape``, and the share of images that it gets right.
    """
    right = logits.argmax(1).eq(labels).float().mean().item()
    best = (0.0, torch.tensor([0.0, 0.0, 0.0, 0.0]), right)
    shares = SHARES if images and tokens else (1.0,)
    grid = product(range(len(SHARPNESSES)) if images else [None], range(len(SHARPNESSES)) if tokens else [None], shares)
    for i, j, share in grid:
        shape, match = [0.0] * 4, 0.0
        for at, index, part, relative in ((0, i, images, 1.0), (2, j, tokens, share)):
            if index is not None:
                gain = relative / part[index].std().clamp(min=1e-6).item()
                shape[at : at + 2] = SHARPNESSES[index], gain
                match = match + gain * part[index]
        for weight in WEIGHTS[1:]:
            accuracy = (logits + weight * match).argmax(1).eq(labels).float().mean().item()
            if accuracy > best[2] or (accuracy == best[2] and 0 < weight < best[0]):
                best = (weight, torch.tensor(shape), accuracy)
    return best
