"""Merging: tokens that look alike go on as one, their mean, and attention knows for how many each one stands.

Bipartite soft matching as in "Token Merging: Your ViT But Faster" (Bolya et al., arXiv 2210.09461), among those tokens
that stand out least (the idea of Tran et al., arXiv 2405.16148, who measure it by an energy; here the mean key does).
Pure functions of tensors; hidden states are in PyTorch's (length, batch, width) order, everything else has the batch
first. Nothing here waits for a device, and hidden states stay in their own precision.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import schedule
from .layout import Gaze


class Plan(NamedTuple):
    """Which of a sequence's S positions are merged, S' = S - r. What stays keeps its order.

    order: (B, S), positions before: those that go on, ascending, then the r that join another;
    into: (B, r), the position afterwards, in 0…S'-1, of the token that each of the latter joins.
    """

    order: Tensor
    into: Tensor

    @property
    def kept(self) -> Tensor:
        """(B, S'), positions before that go on, ascending."""
        return self.order[:, : self.order.shape[1] - self.into.shape[1]]

    @property
    def gone(self) -> Tensor:
        """(B, r), positions before that join another."""
        return self.order[:, self.order.shape[1] - self.into.shape[1] :]


def keys_of(hidden: Tensor, gaze: Gaze) -> Tensor:
    """The mean over heads of a block's keys, without forming them all: (S, B, w) → (B, S, w/H). gaze: the block's."""
    return F.linear(gaze.plain(hidden), *gaze.mean_key).transpose(0, 1)


def match(keys: Tensor, sizes: Tensor, r: int, protected: tuple[int, int] = (1, 0)) -> Plan:
    """The r merges that lose least: what is most like the mean of all is ground, seen many times; what stands out is
    left alone. The ``schedule.CENTRAL`` · r tokens whose keys are nearest to the patches' mean key fall by turns, in
    the order of the sequence, into sets A and B, each of A finds its most similar of B (by the cosine of their keys),
    and of these pairs the r most similar are merged. Several may join the same one.

    Args:
        keys: (B, S, h), of the whole sequence.
        sizes: (B, S), for how many tokens of the image each position stands.
        protected: how many positions at the front (CLS) and at the end (prompts) are left alone.

    Raises:
        ValueError: r is more than half of what is not protected.
    """
    (batch, length, width), (front, back) = keys.shape, protected
    movable = length - front - back
    if not 0 <= r <= movable // 2:
        raise ValueError(f"r = {r}: of {movable} tokens at most {max(movable, 0) // 2} can be merged at once")
    unit = F.normalize(keys, dim=-1, eps=torch.finfo(keys.dtype).tiny)
    tokens, weights = (every[:, front : length - back] for every in (unit, sizes.to(unit.dtype)))
    mean = weights.unsqueeze(1) @ tokens  # (B, 1, h), up to a factor
    likeness = (tokens @ mean.transpose(1, 2)).squeeze(-1)  # (B, n)
    few = schedule.near(movable, r)
    nearest = likeness.sort(dim=-1, descending=True, stable=True).indices[:, :few].sort(dim=-1).values + front
    unit = unit.gather(1, nearest.unsqueeze(-1).expand(-1, -1, width))
    similarity, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)  # (B, A)
    merged = similarity.sort(dim=-1, descending=True, stable=True).indices[:, :r]  # (B, r), places in A
    gone, joined = nearest[:, ::2].gather(1, merged), nearest[:, 1::2].gather(1, partner.gather(1, merged))
    before = torch.arange(length, device=keys.device)
    stays = keys.new_ones(batch, length, dtype=torch.bool).scatter(1, gone, False)
    place = (stays.cumsum(1) - 1).scatter(1, gone, before[length - r :].expand(batch, -1))  # (B, S), in ``order``
    order = torch.empty_like(place).scatter_(1, place, before.expand(batch, -1))
    return Plan(order, place.gather(1, joined))


def merge(hidden: Tensor, sizes: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Means of what is merged, weighted by for how many tokens each stands; the rest goes on bit for bit.

    Args:
        hidden: (S, B, w).
        sizes: (B, S), for how many tokens of the image each position stands; float32.

    Returns:
        The shorter sequence (S', B, w) and its sizes (B, S').
    """
    (batch, r), length = plan.into.shape, len(hidden)
    rows = torch.cat([plan.order, plan.into], dim=1).T  # (S+r, B), positions in a sequence
    rows = torch.add(torch.arange(batch, device=rows.device), rows, alpha=batch).reshape(-1)  # in hidden.flatten(0, 1)
    order, into = rows.split([length * batch, r * batch])
    kept, gone = hidden.flatten(0, 1).index_select(0, order).split([(length - r) * batch, r * batch])
    staying, leaving = sizes.gather(1, plan.order).split([length - r, r], dim=1)  # (B, S'), (B, r)
    sizes = staying.scatter_add(1, plan.into, leaving)  # (B, S')
    # (Σ_i s_i x_i + s x)/(Σ_i s_i + s) = x + Σ_i (x_i - x) s_i/(Σ_i s_i + s)
    share = (leaving / sizes.gather(1, plan.into)).T.reshape(-1, 1).to(hidden.dtype)  # (r·B, 1)
    away = (gone - kept.index_select(0, into)) * share
    return kept.index_add(0, into, away).unflatten(0, (-1, batch)), sizes


def follow(places: Tensor, plan: Plan) -> Tensor:
    """Where tokens are after a further merge, given where they were before it: (B, N) → (B, N), for pictures."""
    batch, after = plan.kept.shape
    position = places.new_empty(batch, after + plan.gone.shape[1])  # (B, S)
    position.scatter_(1, plan.kept, torch.arange(after, device=places.device).expand(batch, -1))
    return position.scatter_(1, plan.gone, plan.into).gather(1, places)


def whereabouts(trail: list[Plan | Tensor], n_tokens: int, lead: int) -> tuple[Tensor, Tensor]:
    """Where an image's N patches have gone on a way of merges and cuts, for pictures.

    Args:
        trail: a plan for each merge, of sequences with ``lead`` positions in front of the tokens; for each cut the
            tokens kept, (B, k) among those that were left. At least one.

    Returns:
        For each of the k tokens at the end the place in 0…N-1 of the patch that it was, (B, k), and for each patch the
        token in 0…k-1 that it is now part of, -1 if it was dropped, (B, N).
    """
    first = trail[0].kept if isinstance(trail[0], Plan) else trail[0]
    of_patch = torch.arange(n_tokens, device=first.device).expand(len(first), -1)  # (B, N)
    place = of_patch  # (B, n)
    for step in trail:
        if isinstance(step, Plan):
            place = place.gather(1, step.kept[:, lead : lead + place.shape[1] - step.gone.shape[1]] - lead)
            of_patch = torch.where(of_patch < 0, of_patch, follow(of_patch.clamp(min=0) + lead, step) - lead)
        else:
            now = torch.arange(step.shape[1], device=step.device).expand_as(step)
            now = torch.full_like(place, -1).scatter(1, step, now)  # (B, n)
            of_patch = torch.where(of_patch < 0, of_patch, now.gather(1, of_patch.clamp(min=0)))
            place = place.gather(1, step)
    return place, of_patch
