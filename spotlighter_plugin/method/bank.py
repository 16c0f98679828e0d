"""The Semantic Memory Bank of preset ``paper``: tokens of classes come in, prototypes that follow them go out.

Learned by moving averages in training, fixed at inference, and empty for as long as nothing reads it.
"""

import torch
from torch import Tensor

from .classes import NamedClasses


class SemanticMemoryBank(NamedClasses):
    """U: P prototypes per class in the hidden space of the vision tower; none, (C, 0, w), before the first update.

    Args:
        class_names: the C classes.
        prototypes: P.
        width: w.
    """

    def __init__(self, class_names: list[str], prototypes: int, width: int):
        super().__init__(class_names)
        self.is_empty = True  # known without asking the device
        self.n_prototypes = prototypes
        self.register_buffer("prototypes", torch.zeros(len(class_names), 0, width))  # (C, P, w)
        self.register_buffer("filled", torch.zeros(len(class_names), 0, dtype=torch.bool))  # (C, P)

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Prototypes of the given classes (B, P, w) and which of them exist (B, P)."""
        return self.prototypes[rows], self.filled[rows]

    @torch.no_grad()
    def update(self, hidden: Tensor, joint: Tensor, rows: Tensor, beta: float, project) -> None:
        """Fill the empty prototypes of the classes in the batch, assign tokens (Eq. 4, 5), move prototypes (Eq. 6).

        Args:
            hidden: h of the kept tokens, best first, (B, k, w).
            joint: z of the same tokens, (B, k, d), unit length.
            rows: the bank's row for each image, (B,); -1 leaves the image out. Repeated rows are averaged together.
            beta: momentum β.
            project: π, (…, w) → (…, d), unit length.
        """
        if self.filled.shape[1] == 0:
            n_classes, _, width = self.prototypes.shape
            self.prototypes = self.prototypes.new_zeros(n_classes, self.n_prototypes, width)
            self.filled = self.filled.new_zeros(n_classes, self.n_prototypes)
        hidden = hidden.to(self.prototypes.dtype)
        known = rows >= 0
        rows = rows.clamp(min=0)
        self._fill(hidden, rows, known)
        current, filled = self.of(rows)  # (B, P, w), (B, P)
        degree, nearest = assign(joint, project(current).to(joint.dtype), filled)  # (B, k) both
        n_classes, n_prototypes, width = self.prototypes.shape
        degree = degree.to(hidden.dtype) * known[:, None]  # (B, k)
        slots = (rows[:, None] * n_prototypes + nearest).flatten()  # (B·k,)
        total = hidden.new_zeros(n_classes * n_prototypes, width)
        total.index_add_(0, slots, (degree.unsqueeze(-1) * hidden).flatten(0, 1))  # Σ D_ij h_i
        mass = hidden.new_zeros(n_classes * n_prototypes).index_add_(0, slots, degree.flatten())  # Σ D_ij
        mean = (total / mass.clamp(min=torch.finfo(mass.dtype).tiny).unsqueeze(-1)).view_as(self.prototypes)
        hit = (mass > 0).view(n_classes, n_prototypes, 1)
        self.prototypes.copy_(torch.where(hit, beta * self.prototypes + (1 - beta) * mean, self.prototypes))
        if self.is_empty:
            self.is_empty = not bool(known.any())

    def _fill(self, hidden: Tensor, rows: Tensor, known: Tensor) -> None:
        """Empty prototypes take the most activated tokens of their class's first image; what it lacks, the next's."""
        n_images, n_tokens, width = hidden.shape
        n_classes, n_prototypes = self.filled.shape
        same = (rows[:, None] == rows) & known  # (B, B), images of one class
        earlier = same.tril(-1).sum(1)  # (B,), number of images of the same class before this one
        place = earlier[:, None] * n_tokens + torch.arange(n_tokens, device=rows.device)  # (B, k), queue of a class
        order = (~self.filled).long()
        slot_of = order.argsort(dim=1, descending=True, stable=True)  # (C, P), empty prototypes first
        n_empty = order.sum(1)  # (C,)
        taken = known[:, None] & (place < n_empty[rows][:, None])  # (B, k)
        slot = slot_of[rows].gather(1, place.clamp(max=n_prototypes - 1))  # (B, k)
        flat = (rows[:, None] * n_prototypes + slot)[taken]
        self.prototypes.view(-1, width)[flat] = hidden[taken]
        self.filled.view(-1)[flat] = True

    def _load_from_state_dict(self, state_dict, prefix, *args):
        saved = state_dict.get(prefix + "prototypes")
        if saved is not None:
            width = self.prototypes.shape[-1]
            if saved.shape[-1] != width:
                raise ValueError(
                    f"the checkpoint's memory bank is {saved.shape[-1]} wide and this vision tower {width}: "
                    "load it with the backbone that it was trained with (MODEL.BACKBONE.NAME)"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.is_empty = not bool(self.filled.any())


def assign(tokens: Tensor, prototypes: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
    """D_ij = softmax_j cos(z_i, π(U_y,j)) over the prototypes that exist (Eq. 4), and each token's argmax j (Eq. 5).

    Args:
        tokens: (B, k, d), unit length.
        prototypes: (B, P, d), those of the image's class.
        filled: (B, P).

    Returns:
        D at the argmax (B, k), and the argmax (B, k).
    """
    cosine = torch.einsum("bkd,bpd->bkp", tokens, prototypes)  # (B, k, P)
    cosine = cosine.masked_fill(~filled[:, None], -torch.inf)
    degree = cosine.softmax(-1).nan_to_num(0.0)  # a class without any prototype assigns nothing
    return degree.max(-1)


def affinity(tokens: Tensor, prototypes: Tensor, filled: Tensor) -> Tensor:
    """How well tokens match each class, Eq. 7: mean_i max_p cos(z_i, π(U_c,p)).

    Args:
        tokens: (B, k, d), unit length.
        prototypes: (C, P, d), unit length.
        filled: (C, P); a class without prototypes gets -inf.

    Returns:
        (B, C).
    """
    cosine = torch.einsum("bkd,cpd->bkcp", tokens, prototypes)  # (B, k, C, P)
    return cosine.masked_fill(~filled, -torch.inf).amax(-1).mean(1)
