"""What a class looks like: image embeddings of its shots come in, what they say of an image's logits goes out.

The Semantic Memory Bank is one Gaussian per class. All share what images of one class differ by, and the classes' means
spread around a common one; both are learned from the shots. An image's evidence for a class is how much likelier it is
there than in a class that nobody has shown: ln p(v | shots of c) - ln p(v | an unknown class), the log-likelihood ratio
of probabilistic linear discriminant analysis (Ioffe 2006; Prince and Elder 2007). An unknown class has evidence 0, so
classes with and without shots share one label space, and an image that no class resembles keeps the host's answer.
Texts are seen through the same shots: what images of one class differ by counts for less, for every class.
``weigh`` finds out how much all this may say, by leaving classes and shots out in turn.
"""

from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .classes import NamedClasses

ENSEMBLE = (0.0, 0.5, 1.0)  # shares of the template ensemble in the texts
DAMPING = (0.0, 0.25, 0.5, 0.75)  # exponents with which texts see what images of one class differ by
WEIGHTS = (0.0, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # of the evidence
UNJUDGED = 0.1  # the weight where no label or no second shot can judge it, and
GUESSED = 1.6  # where every class was shown, if by images enough that are filed under guesses
TOLERATED = 0.002  # share of the images of unknown classes that a choice may lose
CENTRED = 0.5  # share of the common mean that is taken off where texts are damped
EVEN = 0.5  # share of the mean variance in damping; 1 damps nothing
NARROWEST = 0.02  # variance of the means in a direction, of that within classes
PARTITIONS, PARTS, MOST_IMAGES = 4, 4, 4096  # of weighing: of classes, of a class's shots, and images looked at
MOST_CLASSES = 1024  # of which a host's own logits are kept to weigh by
CHUNK = 2**14  # images whose distances to their classes' means are in memory at once


class Gaussians(NamedTuple):
    """C classes in coordinates u = (v - centre) metric, where images of one class have variance 1 in each direction.

    centre: (d,); metric: (d, d); spread ψ: (d,), variance of the classes' means; means: (C, d), of the shots; counts:
    (C,), how many shots.
    """

    centre: Tensor
    metric: Tensor
    spread: Tensor
    means: Tensor
    counts: Tensor


class Shots(NamedTuple):
    """Images by class: means (C, d), counts (C,), the pooled covariance within (d, d) and its degrees of freedom."""

    means: Tensor
    counts: Tensor
    within: Tensor
    freedom: int


class Choice(NamedTuple):
    """What ``weigh`` found: the ensemble's share in the texts, the damping exponent, the evidence's weight beside
    classes that nobody has shown and, closed, where all have been, accuracy (harmonic mean of known and unknown classes
    in one label space) with the former and of the host, and how it was judged."""

    ensemble: float
    damping: float
    weight: float
    closed: float
    accuracy: float
    host: float
    judged: str

    def describe(self) -> str:
        """One line for readers: what was chosen, and why."""
        weights = f"evidence x {self.weight:g} (x {self.closed:g} where every class was shown)"
        chosen = f"{weights}, texts damped by {self.damping:g}, {self.ensemble:.0%} of the templates"
        if self.host != self.host:
            return f"{chosen}, since {self.judged} cannot judge it"
        return f"{chosen}: {100 * self.accuracy:.1f} % right, {100 * self.host:.1f} without it ({self.judged})"


class ClassMemory(NamedClasses):
    """A Gaussian per class; empty until ``remember``. Loading a state replaces it, names included.

    Args:
        class_names: the model's C classes.
        dim: d of the texts' space.
        width: w of the vision tower, by which another one's memory is told.

    Attributes:
        centre, metric, spread, means, counts: the ``Gaussians``; the means in half precision.
        view, image_offset, text_offset: (d, d) and (d,), through which images and texts are compared, after offsets.
        ensemble: scalar, of ``Choice``. weight: (2,), its weight and its closed one.
        choice: what ``weigh`` found; None before ``remember`` and after loading.
    """

    def __init__(self, class_names: list[str], dim: int, width: int = 0):
        super().__init__(class_names)
        self.choice: Choice | None = None
        self.register_buffer("tower", torch.tensor(width))
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("metric", torch.zeros(dim, dim))
        self.register_buffer("spread", torch.zeros(dim))
        self.register_buffer("means", torch.zeros(len(class_names), dim, dtype=torch.half))
        self.register_buffer("counts", torch.zeros(len(class_names), dtype=torch.long))
        self.register_buffer("view", torch.eye(dim))
        self.register_buffer("image_offset", torch.zeros(dim))
        self.register_buffer("text_offset", torch.zeros(dim))
        self.register_buffer("ensemble", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(2))
        self.is_ready = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def remember(
        self, images: Tensor, rows: Tensor, texts: Tensor, ensemble: Tensor | None, scale: float,
        own: Tensor | None = None, judged: bool = True,
    ) -> None:  # fmt: skip
        """Learn what the model's classes look like, in place of what was there, and weigh it.

        Args:
            images: (n, d), unit length.
            rows: (n,), class of each image in 0…C-1.
            texts, ensemble: (C, d), unit length, of the host's prompts and of hand-written templates, if there are any.
            scale: 1/τ.
            own: ``to_weigh_by`` of the host's own logits (n, C) where these are more than cosines over τ; the memory
                leaves texts alone then.
            judged: whether the rows are labels, by which the evidence can be weighed.
        """
        self.name(self.asked)
        shots = statistics(images, rows, len(self.asked))
        learned, seen = fit(shots), shots.counts > 0
        if own is None:
            self.choice = weigh(images, rows, texts, ensemble, scale, None, judged)
        else:
            classes = weighed_classes(len(self.asked)).to(rows.device)
            place = rows.new_full((len(self.asked),), -1)
            place[classes] = torch.arange(len(classes), device=rows.device)
            mine = place[rows] >= 0
            self.choice = weigh(images[mine], place[rows[mine]], texts[classes], None, scale, own, judged)
        self.centre, self.metric, self.spread = learned.centre, learned.metric, learned.spread
        self.means, self.counts = learned.means.to(torch.half), learned.counts
        said = blend(texts, ensemble, self.choice.ensemble)[seen]
        self.view, self.image_offset, self.text_offset = view(shots, said, self.choice.damping)
        self.ensemble = images.new_tensor(self.choice.ensemble)
        self.weight = images.new_tensor([self.choice.weight, self.choice.closed])
        self.is_ready = True

    def texts(self, texts: Tensor, ensemble: Tensor | None) -> Tensor:
        """Texts (C, d) as images are compared with them, unit length: blended with the ensemble, seen as images are."""
        return look(blend(texts, ensemble, self.ensemble), self.text_offset, self.view)

    def cosine(self, image: Tensor, texts: Tensor) -> Tensor:
        """Cosines of images (B, d), unit length, with ``texts`` as this memory gives them: (B, C)."""
        return look(image, self.image_offset, self.view) @ texts.T

    def evidence(self) -> tuple[Tensor, Tensor]:
        """Weight × evidence as one product of [u², u]: factors (2d, C) and constants (C,) of the model's classes."""
        factors, constant = folded(self.gaussians)
        rows = self.rows.clamp(min=0)
        known = (self.rows >= 0) & (self.counts[rows] > 0)
        weight = self.weight[known.all().long()] * known
        return weight * factors[:, rows], weight * constant[rows]

    def add_to(self, logits: Tensor, image: Tensor, evidence: tuple[Tensor, Tensor]) -> Tensor:
        """Logits (B, C) and the ``evidence`` of images (B, d), unit length: (B, C)."""
        return logits + evidence_of(image, self, *evidence)

    @property
    def uses_templates(self) -> bool:
        return self.ensemble.item() > 0

    @property
    def gaussians(self) -> Gaussians:
        return Gaussians(self.centre, self.metric, self.spread, self.means.float(), self.counts)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(prefix + "weight", self.weight)
        if prefix + "keys" in state_dict or weight.shape != self.weight.shape:
            raise ValueError("the checkpoint remembers its shots as an earlier version did: remember them anew")
        width, centre = state_dict.get(prefix + "tower", self.tower), state_dict.get(prefix + "centre", self.centre)
        if width != self.tower or centre.shape != self.centre.shape:
            sizes = ((width, centre), (self.tower, self.centre))
            saved, own = (f"{int(w)} wide, {len(c)} out" for w, c in sizes)
            raise ValueError(
                f"the checkpoint's memory is of a tower {saved}, this one is {own}: set MODEL.BACKBONE.NAME as then"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.choice, self.is_ready = None, bool((self.counts > 0).any())


def statistics(images: Tensor, rows: Tensor, n_classes: int) -> Shots:
    """Of images (n, d) with classes (n,) in 0…C-1."""
    counts = rows.bincount(minlength=n_classes)
    means = images.new_zeros(n_classes, images.shape[1]).index_add_(0, rows, images) / counts.clamp(min=1)[:, None]
    freedom = len(rows) - int((counts > 0).sum())
    within = images.new_zeros(images.shape[1], images.shape[1])
    for part, row in zip(images.split(CHUNK), rows.split(CHUNK), strict=True):
        within += _covariance(part - means[row], freedom)
    return Shots(means, counts, within, freedom)


def fit(shots: Shots) -> Gaussians:
    """Gaussians of classes that were shown.

    The covariance within classes S_w is shrunk toward an even one by d/(d + degrees of freedom); with one shot a class
    there is nothing but half of the variance of all, evenly. The metric is S_w^(-1/2), turned to where the covariance
    of the classes' means, less what of it is chance, is diagonal.
    """
    seen, width = shots.counts > 0, len(shots.within)
    centre = shots.means[seen].mean(0)
    apart = shots.means[seen] - centre
    even = shots.within.diagonal().mean() if shots.freedom else apart.square().mean() / 2
    within = _evened(shots.within, even.clamp(min=1e-8), width / (width + shots.freedom))
    values, directions = torch.linalg.eigh(within)
    whiten = directions * values.rsqrt() @ directions.T
    between = _covariance(apart @ whiten, max(len(apart) - 1, 1))
    between.diagonal().sub_((1 / shots.counts[seen]).mean())
    spread, turn = torch.linalg.eigh(_evened(between, between.diagonal().mean(), 0.1))
    means = (shots.means - centre) @ whiten @ turn * seen[:, None]
    return Gaussians(centre, whiten @ turn, spread.clamp(min=NARROWEST), means, shots.counts)


def folded(classes: Gaussians) -> tuple[Tensor, Tensor]:
    """Evidence as a linear function of [u², u]: factors (2d, C) and constants (C,); 0 for classes without shots.

    After n shots a class's mean is nψ/(nψ+1) ū, give or take a variance of ψ/(nψ+1) in each direction.
    """
    n, spread = classes.counts[:, None].float(), classes.spread
    mean, variance = n * spread / (n * spread + 1) * classes.means, 1 + spread / (n * spread + 1)  # (C, d) both
    unknown = 1 + spread
    constant = -0.5 * (mean.square() / variance + (variance / unknown).log()).sum(-1)
    return torch.cat([0.5 * (1 / unknown - 1 / variance), mean / variance], dim=-1).T, constant


def evidence_of(images: Tensor, classes: Gaussians, factors: Tensor, constants: Tensor) -> Tensor:
    """ln p(v | class) - ln p(v | unknown class), as ``folded`` gives factors and constants: (n, d) → (n, C)."""
    u = (images - classes.centre) @ classes.metric
    return torch.addmm(constants, torch.cat([u * u, u], dim=-1), factors)


def view(shots: Shots, texts: Tensor, exponent: float) -> tuple[Tensor, Tensor, Tensor]:
    """Through what images and texts are compared: (S/mean)^(-exponent/2) of the evened covariance within classes, and
    what is taken off images and off ``texts`` (K, d) first, a share of their means. Nothing changes for exponent 0."""
    even = shots.within.diagonal().mean()
    if exponent == 0 or not even > 0:
        zero = torch.zeros_like(shots.within[0])
        return torch.eye(len(zero), device=zero.device), zero, zero.clone()
    values, directions = torch.linalg.eigh(_evened(shots.within, even, EVEN))
    matrix = directions * (values / values.mean()) ** (-exponent / 2) @ directions.T
    return matrix, CENTRED * shots.means[shots.counts > 0].mean(0), CENTRED * texts.mean(0)


def look(vectors: Tensor, offset: Tensor, matrix: Tensor) -> Tensor:
    """(…, d) → (…, d), unit length."""
    return F.normalize((vectors - offset) @ matrix, dim=-1)


def blend(texts: Tensor, ensemble: Tensor | None, share: float | Tensor) -> Tensor:
    """Texts (C, d) with a share of the template ensemble, unit length."""
    return texts if ensemble is None else F.normalize(torch.lerp(texts, ensemble, share), dim=-1)


def weigh(
    images: Tensor, rows: Tensor, texts: Tensor, ensemble: Tensor | None, scale: float,
    own: Tensor | None = None, judged: bool = True,
) -> Choice:  # fmt: skip
    """How much templates, damping and evidence may say: what has the best harmonic mean in one label space.

    In each of ``PARTITIONS`` a random half of the classes is forgotten and plays the unknown ones; of the others each
    quarter of the shots tests what the rest teaches. Nothing is chosen that costs known classes anything, or unknown
    ones more than ``TOLERATED``, of what the host has; of what is as good as the best, give or take a standard error
    over the partitions, the lightest evidence is taken. Where every class of a model was shown, nothing speaks for the
    unknown: there the weight is taken that is best among the known alone. Arguments as of ``ClassMemory.remember``.
    """
    shares = ENSEMBLE if ensemble is not None and own is None else ENSEMBLE[:1]
    dampings = DAMPING if own is None else DAMPING[:1]
    place, classes = place_in_class(rows), rows.unique()
    parts = min(PARTS, int(place.max()) + 1) if len(place) else 0
    if not judged or len(classes) < 2 or parts < 3:
        why = "guessed labels" if not judged else "one class" if len(classes) < 2 else "fewer than three shots a class"
        beside_unknown = UNJUDGED if place.any() else UNJUDGED / 4  # of one shot nobody knows by what images differ
        closed = UNJUDGED if judged or parts < 3 else GUESSED
        fixed = shares[-1], dampings[len(dampings) // 2], beside_unknown, closed
        return Choice(*fixed, float("nan"), float("nan"), why)
    generator = torch.Generator().manual_seed(0)
    grid = list(product(shares, dampings, WEIGHTS))
    right = images.new_zeros(PARTITIONS, 3, len(grid))  # accuracy on known, unknown, known among known
    some = max(2, MOST_IMAGES * len(classes) // max(len(rows), MOST_IMAGES))  # classes that are looked at
    for fold in range(parts * PARTITIONS):
        if fold % parts == 0:
            order = classes[torch.randperm(len(classes), generator=generator)[:some].to(rows.device)]
        row = torch.full((int(rows.max()) + 1,), -1, device=rows.device)
        row[order] = torch.arange(len(order), device=rows.device)  # the first half is known
        known = (len(order) + 1) // 2
        mine = row[rows]
        learns = (mine >= 0) & (mine < known) & (place % parts != fold % parts)
        tests = (mine >= known) | ((mine >= 0) & ~learns)
        if not learns.any():  # the known classes have one shot each, and it is left out
            continue
        said = texts[order], None if ensemble is None else ensemble[order], scale
        host = None if own is None else own[tests][:, order]
        right[fold // parts] += _judge(images, mine, learns, tests, known, *said, host, grid) / parts
    both = right[:, :2]
    means = 2 * both.prod(1) / both.sum(1).clamp(min=1e-9)  # (PARTITIONS, grid)
    mean, (known, unknown, closed) = means.mean(0), right.mean(0)
    allowed = (known >= known[0]) & (unknown >= unknown[0] - TOLERATED) & (mean >= mean[0])  # the host is the first
    best = torch.where(allowed, mean, -1).argmax()
    error = (means - means[:, best, None]).std(0) / PARTITIONS**0.5  # of the difference to the best
    as_good = allowed & (mean + error >= mean[best])
    weights = torch.tensor([weight for *_, weight in grid], device=mean.device)
    lightest = as_good & (weights == weights[as_good].min())
    chosen = int(torch.where(lightest, mean, -1).argmax())
    judged_by = f"half of {len(order)} classes and a part of the shots left out, {PARTITIONS} times"
    alone = WEIGHTS[int(closed.view(-1, len(WEIGHTS))[chosen // len(WEIGHTS)].argmax())]  # of the same texts
    return Choice(*grid[chosen], alone, mean[chosen].item(), mean[0].item(), judged_by)


def _judge(images, rows, learns, tests, known, texts, ensemble, scale, own, grid) -> Tensor:
    """Accuracy on known and on unknown classes, all in one label space, and on known ones in one of their own, for each
    entry of the grid: (3, grid)."""
    shots = statistics(images[learns], rows[learns], known)
    gaussians = fit(shots)
    held, labels = images[tests], rows[tests]
    evidence = F.pad(evidence_of(held, gaussians, *folded(gaussians)), (0, len(texts) - known))  # (n, C)
    is_known, result = labels < known, []
    for share, exponent in dict.fromkeys((share, exponent) for share, exponent, _ in grid):
        logits = own
        if own is None:
            seen = blend(texts, ensemble, share)
            matrix, image_offset, text_offset = view(shots, seen[:known], exponent)
            logits = scale * look(held, image_offset, matrix) @ look(seen, text_offset, matrix).T
        for weight in WEIGHTS:
            scores = logits + weight * evidence
            hit, closed = scores.argmax(1) == labels, scores[is_known, :known].argmax(1) == labels[is_known]
            result.append(torch.stack([each.float().mean() for each in (hit[is_known], hit[~is_known], closed)]))
    return torch.stack(result, 1).nan_to_num(0.0)


def weighed_classes(n_classes: int) -> Tensor:
    """The classes that a host's own logits are weighed by, ascending: all, or ``MOST_CLASSES`` at random."""
    return torch.randperm(n_classes, generator=torch.Generator().manual_seed(0))[:MOST_CLASSES].sort().values


def to_weigh_by(logits: Tensor, rows: Tensor) -> Tensor:
    """Of logits (n, C) of images of classes (n,) what weighing looks at: those of ``weighed_classes`` among them."""
    classes = weighed_classes(logits.shape[1]).to(logits.device)
    return logits[torch.isin(rows, classes)][:, classes]


def place_in_class(rows: Tensor) -> Tensor:
    """How many earlier images are of the same class: (n,) → (n,)."""
    order = rows.argsort(stable=True)
    ordered = rows[order]
    first = torch.searchsorted(ordered, ordered)
    return torch.empty_like(rows).scatter_(0, order, torch.arange(len(rows), device=rows.device) - first)


def _covariance(centred: Tensor, freedom: int) -> Tensor:
    return centred.T @ centred / max(freedom, 1)


def _evened(covariance: Tensor, even: Tensor, share: float) -> Tensor:
    """Shrunk toward the even covariance: (d, d)."""
    return torch.lerp(covariance, even * torch.eye(len(covariance), device=covariance.device), share)
