"""What a class looks like: descriptions of its images come in, what they say of its logits goes out.

Once training is over, the few tokens that mattered most in each training image are written down, each beside its
image's CLS, seen along directions that tell classes apart rather than images of one class. A test image's own few
tokens then vote: each for the classes whose tokens resemble it most. The shots are remembered as they are, so training
leaves the match out. Then ``choose`` weighs it on held-out images, or ``unjudged`` where nobody knows their labels.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .classes import NamedClasses

CLS_SHARE = 0.5  # length of CLS beside a token of length 1
RIDGE = 0.03  # of the mean variance within classes, added to every direction's own
SHORTLIST = 16  # classes per image that are looked at token by token
MANY = 1024  # classes; of more, the shortlist compares whole classes and not each of their images
SHARPNESSES = (1.0, 3.0, 6.0)
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
SAY = 0.25  # of what the texts say, where no label can judge the match
ON_CPU, ON_GPU = 2**22, 2**27  # numbers that are gathered at once: a CPU's caches are small, a GPU wants few launches


class ShotMemory(NamedClasses):
    """Up to V images per class as m keys each; empty until ``remember``.

    Args:
        class_names: the model's C classes.
        tokens: how many of an image's tokens are described; 0: CLS alone.
        width: w of the vision tower.

    Attributes:
        keys: (C, V, m, D) half precision, unit length.
        filled: (C, V), which images exist.
        centre, view: (D,) and (D, D): a description x becomes the key normalize((x - centre) view).
        sharpness: b of ``votes``, a scalar.
        weight: of the match in the logits, a scalar; 0 before ``calibrate``.
    """

    def __init__(self, class_names: list[str], tokens: int, width: int):
        super().__init__(class_names)
        self.shape = (tokens, 2 * width) if tokens else (1, width)  # (m, D)
        self.register_buffer("keys", torch.zeros(len(class_names), 0, *self.shape, dtype=torch.half))
        self.register_buffer("filled", torch.zeros(len(class_names), 0, dtype=torch.bool))
        self.register_buffer("centre", torch.zeros(self.shape[1]))
        self.register_buffer("view", torch.zeros(self.shape[1], self.shape[1]))
        self.register_buffer("sharpness", torch.tensor(SHARPNESSES[0]))  # 0 would make NaN of classes without images
        self.register_buffer("weight", torch.zeros(()))
        self.register_buffer("coarse", torch.zeros(len(class_names), 0, self.shape[1]), persistent=False)

    @property
    def is_ready(self) -> bool:
        """Whether images are remembered, some of them of the model's classes."""
        return self.keys.numel() > 0 and self.knows_any

    @torch.inference_mode(False)
    @torch.no_grad()
    def remember(self, descriptions: Tensor, rows: Tensor) -> None:
        """Write images down in place of what was there, and learn from them how to look.

        Args:
            descriptions: (n, m, D), as ``describe`` gives them.
            rows: (n,), class of each image in 0…C-1.
        """
        self.name(self.asked)
        place = place_in_class(rows)
        self.centre, self.view = discriminating_view(descriptions.mean(1), rows)  # an image's tokens may well differ
        keys = self.look(descriptions)
        self.keys = keys.new_zeros(len(self.asked), int(place.max()) + 1, *self.shape, dtype=torch.half)
        self.filled = torch.zeros(self.keys.shape[:2], dtype=torch.bool, device=keys.device)
        self.keys[rows, place] = keys.to(torch.half)  # forks without a GPU make .half() do nothing
        self.filled[rows, place] = True
        self.coarse = coarse_keys(self.keys)

    @torch.inference_mode(False)
    @torch.no_grad()
    def calibrate(self, seen: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> float | None:
        """Weigh the match on held-out images, never on the remembered ones.

        Args:
            seen: batches of logits (n, C) from the texts alone, descriptions (n, m, D) and labels (n,), or None for all
                labels: without them the match is given a share of what the texts say.

        Returns:
            The share of these images that are then right; None without labels or images.
        """
        self.weight.zero_()
        logits, labels, matches = [], [], []
        for scores, descriptions, targets in seen:
            logits.append(scores)
            labels.append(targets)
            matches.append([self.match(descriptions, sharpness) for sharpness in SHARPNESSES])
        if not logits:
            return None
        logits, matches, right = torch.cat(logits), [torch.cat(match) for match in zip(*matches, strict=True)], None
        if labels[0] is None:
            sharpness, weight = SHARPNESSES[1], unjudged(logits, matches[1])
        else:
            sharpness, weight, right = choose(logits, torch.cat(labels), matches)
        self.sharpness.fill_(sharpness)
        self.weight.fill_(weight)
        return right

    def add_to(self, logits: Tensor, descriptions: Tensor) -> Tensor:
        """Logits (B, C) of the texts and the weighed match of images described as (B, m, D): (B, C)."""
        return logits + self.weight * self.match(descriptions, self.sharpness)

    def match(self, descriptions: Tensor, sharpness: float | Tensor) -> Tensor:
        """``votes`` for the model's classes, 0 for those that are not remembered: (B, m, D) → (B, C)."""
        cosines, classes = resemblance(self.look(descriptions), self.keys, self.filled, self.coarse)
        match = votes(cosines, classes, sharpness, len(self.keys))
        return match[:, self.rows.clamp(min=0)] * (self.rows >= 0)

    def look(self, descriptions: Tensor) -> Tensor:
        """Keys of descriptions: (…, D) → (…, D), unit length."""
        return F.normalize((descriptions - self.centre) @ self.view, dim=-1)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        saved = {name: tuple(state_dict[prefix + name].shape) for name in self._buffers if prefix + name in state_dict}
        n_classes, shots = (saved.get("filled", ()) + (0, 0))[:2]
        own = {"keys": (n_classes, shots, *self.shape), "centre": self.shape[1:], "view": (self.shape[1],) * 2}
        for name, shape in own.items():
            if saved.get(name, shape) != shape:
                raise ValueError(
                    f"the checkpoint's memory.{name} is {saved[name]}, this model's {shape}: set TRAINER.SPOTLIGHTER "
                    "(PRESET, MATCH_TOKENS) and MODEL.BACKBONE.NAME as in training"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
        if len(self.class_names) != n_classes:
            raise ValueError(f"the checkpoint's memory has {n_classes} classes and {len(self.class_names)} names")
        self.coarse = coarse_keys(self.keys)


def describe(tokens: Tensor, cls: Tensor) -> Tensor:
    """Each token beside its image's CLS: (B, m, w), (B, w) → (B, m, 2w); without tokens CLS alone, (B, 1, w)."""
    cls = F.normalize(cls.float(), dim=-1).unsqueeze(1)  # (B, 1, w)
    if tokens.shape[1] == 0:
        return cls
    tokens = F.normalize(tokens.float(), dim=-1)
    return torch.cat([tokens, CLS_SHARE * cls.expand(-1, tokens.shape[1], -1)], dim=-1)


def discriminating_view(described: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Directions weighed so that images of one class differ alike in all of them: S^(-1/2).

    S is the covariance within classes, with ``RIDGE`` of its mean variance added in every direction.

    Args:
        described: (n, D).
        rows: (n,), their classes.

    Returns:
        The centre (D,) and the view (D, D).
    """
    described = described.double()
    classes, index = rows.unique(return_inverse=True)
    sums = described.new_zeros(len(classes), described.shape[1]).index_add_(0, index, described)
    within = described - (sums / index.bincount().unsqueeze(1))[index]
    covariance = within.T @ within / len(described)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean() + 1e-6)
    variance, axes = torch.linalg.eigh(covariance)
    return described.mean(0).float(), (axes * variance.rsqrt() @ axes.T).float()


def coarse_keys(keys: Tensor) -> Tensor:
    """Each image's mean key, (C, V, D), or with more than ``MANY`` classes each class's, (C, 1, D); unit length."""
    images = F.normalize(keys.mean(2).float(), dim=-1)
    return images if len(images) <= MANY else F.normalize(images.sum(1, keepdim=True), dim=-1)


def resemblance(queries: Tensor, keys: Tensor, filled: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
    """max_r cos(q_i, K_c,r) of each query token with the keys of the classes that its image resembles most.

    Without a shortlist each token would meet all C·V·m keys; with it, what grows with C is one product with ``coarse``.

    Args:
        queries: (B, m, D), unit length.
        keys: (C, V, m, D), unit length.
        filled: (C, V), which of them exist.
        coarse: ``coarse_keys`` of them.

    Returns:
        The cosines (B, m, S) and the classes (B, S), S = min(``SHORTLIST``, C).
    """
    overall = F.normalize(queries.mean(1), dim=-1)  # (B, D)
    there = filled[:, : coarse.shape[1]]  # a class with images has a first
    alike = torch.einsum("be,cve->bcv", overall, coarse).masked_fill(~there, -torch.inf).amax(-1)  # (B, C)
    classes = alike.topk(min(SHORTLIST, len(keys)), dim=1).indices  # (B, S)
    on_cpu = keys.device.type == "cpu"
    precision = queries.dtype if on_cpu else keys.dtype  # a GPU multiplies the keys as they are kept
    step = max(1, (ON_CPU if on_cpu else ON_GPU) // (classes.shape[1] * keys[0].numel()))
    cosines = []
    for some, mine in zip(queries.to(precision).split(step), classes.split(step), strict=True):
        theirs = keys.index_select(0, mine.flatten()).to(precision)  # (b·S, V, m, D)
        cosine = theirs.view(len(some), -1, theirs.shape[-1]) @ some.transpose(1, 2)  # (b, S·V·m, m)
        cosine = cosine.view(*mine.shape, *keys.shape[1:3], -1)  # (b, S, V, m, m)
        cosine = cosine.masked_fill(~filled[mine][:, :, :, None, None], -torch.inf)
        cosines.append(cosine.flatten(2, 3).amax(2).transpose(1, 2).float())  # (b, m, S)
    return torch.cat(cosines), classes


def votes(cosines: Tensor, classes: Tensor, sharpness: float | Tensor, n_classes: int) -> Tensor:
    """mean_i exp(-b (1 - cos_i)), what of it exceeds the shortlist's mean; 0 for all other classes: (B, C)."""
    match = torch.exp(-sharpness * (1 - cosines)).mean(1)  # (B, S)
    match = (match - match.mean(1, keepdim=True)).clamp(min=0)
    return match.new_zeros(len(match), n_classes).scatter(1, classes, match)


def choose(logits: Tensor, labels: Tensor, matches: list[Tensor]) -> tuple[float, float, float]:
    """The sharpness with which most held-out images are right, and the lightest weight that gets as many right.

    Args:
        logits: (n, C), from the texts alone.
        labels: (n,).
        matches: ``votes`` at each of ``SHARPNESSES``, (n, C) each.

    Returns:
        Sharpness, weight, and the share of images that they get right.
    """
    best = logits.argmax(1).eq(labels).float().mean().item()
    chosen = SHARPNESSES[0], 0.0, best
    for sharpness, match in zip(SHARPNESSES, matches, strict=True):
        gain = 1 / match.amax(1).mean().clamp(min=1e-6).item()
        for weight in (weight * gain for weight in WEIGHTS):
            right = (logits + weight * match).argmax(1).eq(labels).float().mean().item()
            if right > best:
                best, chosen = right, (sharpness, weight, right)
    return chosen


def unjudged(logits: Tensor, match: Tensor) -> float:
    """The weight at which the match says ``SAY`` of what the texts say, for images whose labels nobody knows.

    Either says as much as an image's best class stands out from the mean of all, on average over the images.

    Args:
        logits: (n, C), from the texts alone.
        match: ``votes``, (n, C).
    """
    texts, match = ((scores.amax(1) - scores.mean(1)).mean().item() for scores in (logits, match))
    return SAY * texts / match if match > 0 else 0.0


def place_in_class(rows: Tensor) -> Tensor:
    """How many earlier images are of the same class: (n,) → (n,)."""
    order = rows.argsort(stable=True)
    ordered = rows[order]
    first = torch.searchsorted(ordered, ordered)
    return torch.empty_like(rows).scatter_(0, order, torch.arange(len(rows), device=rows.device) - first)
