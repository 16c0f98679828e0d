"""The losses of Eq. 7 and 12-15. Cosines come in; nothing here knows a model."""

import torch
import torch.nn.functional as F
from torch import Tensor

GRA = ("gra", "gra_low", "gra_high")  # L_gra, and its parts on level 2 and on level 1


def local_loss(affinity: Tensor, rows: Tensor, scale: Tensor | float) -> Tensor:
    """L_local, Eq. 7: cross entropy over the bank's classes of the tokens' match with their prototypes.

    Args:
        affinity: mean_i max_p cos(z_i, π(U_c,p)), (B, C), -inf for classes without prototypes.
        rows: (B,), the bank's row of each image's class; -1 leaves the image out.
        scale: 1/τ.
    """
    summed = F.cross_entropy(scale * affinity, rows, ignore_index=-1, reduction="sum")
    return summed / (rows >= 0).sum().clamp(min=1)


def refine_affinity(affinity: Tensor, tokens: Tensor, refined: Tensor, category: Tensor) -> Tensor:
    """Eq. 7 on the final prototypes: the matched class's column is taken with Û in the place of U_c*.

    Args:
        affinity: (B, C).
        tokens: (B, k, d), unit length.
        refined: π(Û), (B, P, d), unit length.
        category: c*, (B,).
    """
    own = torch.einsum("bkd,bpd->bkp", tokens, refined).amax(-1).mean(-1)  # (B,)
    return affinity.scatter(1, category[:, None], own[:, None])


def text_regularisation(text: Tensor, frozen_text: Tensor) -> Tensor:
    """L_reg_text, Eq. 13: mean |t⁰ - t^rep|, t^rep normalized and averaged over the batch; both (C, d)."""
    return (frozen_text - text).abs().mean()


def visual_divergence(image: Tensor, full_image: Tensor, frozen_text: Tensor, scale: Tensor | float) -> Tensor:
    """L_KL_visual, Eq. 14: KL(p(·|v⁰) ‖ p(·|v)) over the classes of t⁰; v⁰ and t⁰ carry no gradient.

    Args:
        image: v, (B, d), unit length.
        full_image: v⁰, (B, d), unit length.
        frozen_text: t⁰, (C, d), unit length.
        scale: 1/τ.
    """
    frozen_text = frozen_text.detach()
    full = (scale * full_image.detach() @ frozen_text.T).detach().log_softmax(-1)
    return F.kl_div((scale * image @ frozen_text.T).log_softmax(-1), full, reduction="batchmean", log_target=True)


def total_loss(parts: dict[str, Tensor], lambda1: float, lambda2: float, lambda3: float) -> Tensor:
    """L = L_cls + λ1 L_gra + λ2 L_reg_text + λ3 (L_KL_visual + L_local), Eq. 15; parts that are absent count as zero.

    Args:
        parts: losses by name: ``cls``, and any of ``gra`` (or a part of it), ``reg_text``, ``kl_visual``, ``local``.
    """
    weights = {"cls": 1.0, "reg_text": lambda2, "kl_visual": lambda3, "local": lambda3, **dict.fromkeys(GRA, lambda1)}
    return sum(weights[name] * value for name, value in parts.items())
