"""What training minimises: a batch that has passed the tower comes in, its losses by name go out."""

import torch.nn.functional as F
from torch import Tensor

from . import losses
from .bank import affinity
from .selector import Selector


def objective(batch: Selector, host, image: Tensor, logits: Tensor, labels: Tensor, extras: dict) -> dict[str, Tensor]:
    """L_cls and the losses that ``batch.wants``, unweighted, Eq. 7 and 12-14.

    Args:
        host: the host's adapter.
        image: v before normalization, (B, d).
        logits: (B, C).
        labels: (B,).
        extras: what the host's loss wants beside these.
    """
    parts = {"cls": host.objective(logits, labels, extras)}  # Eq. 12
    if batch.levels:
        levels = [host.classification_loss(batch.logits(*level), labels, extras) for level in batch.levels]
        parts[next(name for name in losses.GRA if name in batch.wants)] = sum(levels)
    if "reg_text" in batch.wants:
        text = batch.mean(batch.plugin.mapping.text(batch.text, batch.tokens, batch.scale).mean())
        parts["reg_text"] = losses.text_regularisation(text, host.frozen_text())
    if batch.full is not None:
        full, image = F.normalize(batch.full.float(), dim=-1), F.normalize(image, dim=-1)
        parts["kl_visual"] = losses.visual_divergence(image, full, host.frozen_text(), batch.scale)
    bank = batch.plugin.bank
    if "local" in batch.wants and not bank.is_empty:
        match = affinity(batch.tokens, batch.prototypes, bank.filled)  # (B, C of the bank)
        if batch.refined is not None:
            refined = batch.project(batch.refined).transpose(0, 1)  # (B, P, d)
            match = losses.refine_affinity(match, batch.tokens, refined, batch.category)
        parts["local"] = losses.local_loss(match, batch.rows, batch.scale)
    return parts
