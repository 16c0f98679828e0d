"""Few-shot heads on CLS features: what simple means reach without any token. Pure functions of tensors.

A head learns from shots of the first K of C classes: ``fit`` gives its state, ``logits`` its answer over all C classes.
Features f (n, d) are float32 of unit length. Each head is tuned over a grid of ``POINTS`` settings.

A head that adds scores of the known classes to the texts' logits centres them over these classes, and counts its weight
in units of the texts' own spread on the shots, so that one grid suits every tower.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

POINTS = 24
RIDGE = 1e-4  # share of the features' whole variance that every covariance has in each direction
STEPS = 100  # of L-BFGS


@dataclass(frozen=True)
class Texts:
    """Text embeddings (C, d) of unit length, and the host's 1/τ.

    Attributes:
        host: of the host's prompt. plain: of the data set's hand-written prompt, through frozen CLIP.
        ensemble: the mean over templates, through frozen CLIP.
    """

    host: Tensor
    plain: Tensor
    ensemble: Tensor
    scale: float

    def logits(self, features: Tensor) -> Tensor:
        """The host's own: (n, d) → (n, C)."""
        return self.scale * features @ self.host.T


@dataclass(frozen=True)
class Head:
    """A way to classify features.

    Attributes:
        fit: (shots (m, d), their classes (m,), texts, K, **setting) → state, a dictionary of tensors.
        logits: (state, features (n, d), texts) → (n, C).
        grid: the settings that tuning compares, lightest first.
        sees_all: whether it needs shots of every class.
    """

    fit: Callable
    logits: Callable
    grid: tuple[dict, ...] = ({},)
    sees_all: bool = False


# -------------------------------------------------------------------------------------------------------- texts alone


def _texts(kind: str) -> Head:
    return Head(
        lambda shots, labels, texts, known: {},
        lambda state, features, texts: texts.scale * features @ getattr(texts, kind).T,
    )


def fit_blend(shots: Tensor, labels: Tensor, texts: Texts, known: int, share: float) -> dict:
    """Nothing to learn: the templates' share of each text."""
    return {"share": torch.tensor(share)}


def blend_logits(state: dict, features: Tensor, texts: Texts) -> Tensor:
    """scale · cos(f, (1-r) t + r t_templates)."""
    blended = torch.lerp(texts.host, texts.ensemble, state["share"].to(texts.host))
    return texts.scale * features @ F.normalize(blended, dim=-1).T


def fit_residual(shots: Tensor, labels: Tensor, texts: Texts, known: int, decay: float) -> dict:
    """W (d, d) of t + W t: least cross entropy of the shots among the known classes, plus decay · |W|²."""
    width = shots.shape[1]
    start = torch.zeros(width, width, device=shots.device)

    def loss(weight):
        logits = texts.scale * shots @ F.normalize(texts.host[:known] + texts.host[:known] @ weight.T, dim=-1).T
        return F.cross_entropy(logits, labels) + decay * weight.square().sum()

    return {"weight": _minimum(loss, start)}


def residual_logits(state: dict, features: Tensor, texts: Texts) -> Tensor:
    return texts.scale * features @ F.normalize(texts.host + texts.host @ state["weight"].T, dim=-1).T


# ------------------------------------------------------------------------------------------ what is added to the texts


def _added(remember: Callable, scores: Callable) -> tuple[Callable, Callable]:
    """fit and logits of a head that adds scores (n, K) of the known classes to the texts' logits."""

    def fit(shots, labels, texts, known, weight, **shape):
        state = remember(shots, labels, texts, known, **shape)
        mine, theirs = (_centred(x) for x in (scores(state, shots), texts.logits(shots)[:, :known]))
        return {**state, "weight": weight * theirs.std() / mine.std().clamp(min=1e-12)}

    def logits(state, features, texts):
        added = _centred(scores(state, features))  # (n, K)
        base = texts.logits(features)
        return torch.cat([base[:, : added.shape[1]] + state["weight"] * added, base[:, added.shape[1] :]], 1)

    return fit, logits


def remember_shots(shots: Tensor, labels: Tensor, texts: Texts, known: int, sharpness: float) -> dict:
    """Tip-Adapter: the shots are keys, their classes values."""
    return {"keys": shots, "values": F.one_hot(labels, known).float(), "sharpness": torch.tensor(sharpness)}


def cache_scores(state: dict, features: Tensor) -> Tensor:
    """Σ_i exp(-β (1 - cos(f, key_i))) of the shots of each class: (n, K)."""
    return (-state["sharpness"].to(features) * (1 - features @ state["keys"].T)).exp() @ state["values"]


def remember_whitened(shots: Tensor, labels: Tensor, texts: Texts, known: int, sharpness: float, shrink: float) -> dict:
    """The same where each direction counts by how little it varies within a class: keys are S^-½ (f - mean)."""
    centre = shots.mean(0)
    _, covariance = class_statistics(shots, labels, known, shrink)
    variance, axes = torch.linalg.eigh(covariance)
    view = (axes * variance.rsqrt() @ axes.T).float()  # (d, d)
    keys = F.normalize((shots - centre) @ view, dim=-1)
    return {"centre": centre, "view": view, **remember_shots(keys, labels, texts, known, sharpness)}


def whitened_scores(state: dict, features: Tensor) -> Tensor:
    return cache_scores(state, F.normalize((features - state["centre"]) @ state["view"], dim=-1))


def remember_gaussians(shots: Tensor, labels: Tensor, texts: Texts, known: int, shrink: float) -> dict:
    """Linear discriminant: w_c = S⁻¹ μ_c, b_c = -½ μ_cᵀ S⁻¹ μ_c."""
    means, covariance = class_statistics(shots, labels, known, shrink)
    weight = torch.linalg.solve(covariance, means.T)  # (d, K)
    return {"weights": weight.float(), "bias": -0.5 * (means.T * weight).sum(0).float()}


def gaussian_scores(state: dict, features: Tensor) -> Tensor:
    return features @ state["weights"] + state["bias"]


def remember_ridge(shots: Tensor, labels: Tensor, texts: Texts, known: int, sharpness: float, ridge: float) -> dict:
    """Kernel ridge regression with the texts as prior: (K + λ I)⁻¹ (onehot - softmax(texts' logits))."""
    missing = F.one_hot(labels, known).double() - texts.logits(shots)[:, :known].double().softmax(1)  # (m, K)
    kernel = (-sharpness * (1 - shots.double() @ shots.double().T)).exp()
    kernel.diagonal().add_(ridge)
    return {"keys": shots, "values": torch.linalg.solve(kernel, missing).float(), "sharpness": torch.tensor(sharpness)}


# -------------------------------------------------------------------------------------------------------- linear probe


def fit_probe(shots: Tensor, labels: Tensor, texts: Texts, known: int, decay: float) -> dict:
    """Multinomial logistic regression on τ⁻¹ f over all classes that have shots: least cross entropy + decay · |W|²."""
    classes = int(labels.max()) + 1
    start = torch.zeros(classes, shots.shape[1] + 1, device=shots.device)
    inputs = F.pad(texts.scale * shots, (0, 1), value=1.0)

    def loss(weight):
        return F.cross_entropy(inputs @ weight.T, labels) + decay * weight[:, :-1].square().sum()

    return {"weight": _minimum(loss, start)}


def probe_logits(state: dict, features: Tensor, texts: Texts) -> Tensor:
    return F.pad(texts.scale * features, (0, 1), value=1.0) @ state["weight"].T


# -------------------------------------------------------------------------------------------------------- small change


def class_statistics(shots: Tensor, labels: Tensor, known: int, shrink: float) -> tuple[Tensor, Tensor]:
    """Class means (K, d) and S (d, d), float64: the covariance within classes, a share of it made round.

    S = (1-h) S_within + (h mean(diag S_within) + RIDGE mean(diag S_all)) I.
    """
    shots = shots.double()
    counts = labels.bincount(minlength=known).clamp(min=1).unsqueeze(1)
    means = shots.new_zeros(known, shots.shape[1]).index_add_(0, labels, shots) / counts
    rest = shots - means[labels]
    within = rest.T @ rest / len(shots)
    floor = RIDGE * (shots - shots.mean(0)).square().mean()
    covariance = (1 - shrink) * within
    covariance.diagonal().add_(shrink * within.diagonal().mean() + floor)
    return means, covariance


def _centred(scores: Tensor) -> Tensor:
    return scores - scores.mean(1, keepdim=True)


@torch.enable_grad()
def _minimum(loss: Callable, start: Tensor) -> Tensor:
    """Where a smooth loss is least, by L-BFGS from ``start``."""
    weight = start.clone().requires_grad_()
    search = torch.optim.LBFGS([weight], max_iter=STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def closure():
        search.zero_grad()
        value = loss(weight)
        value.backward()
        return value

    search.step(closure)
    return weight.detach()


def _grid(**axes) -> tuple[dict, ...]:
    """Every combination; the axis named last varies slowest, so that ties go to the lightest weight."""
    names = list(axes)[::-1]
    points = itertools.product(*(axes[name] for name in names))
    return tuple(dict(zip(names, point, strict=True)) for point in points)


_SIX, _EIGHT = (0.0, 0.2, 0.6, 2.0, 6.0, 18.0), (0.0, 0.1, 0.2, 0.4, 1.0, 2.5, 6.0, 15.0)
_DECAYS = tuple(10 ** (1 - 7 * i / (POINTS - 1)) for i in range(POINTS))  # 10 … 10⁻⁶

HEADS = {
    "zero-shot": _texts("plain"),
    "zero-shot + templates": _texts("ensemble"),
    "host": _texts("host"),
    "text residual": Head(fit_residual, residual_logits, _grid(decay=_DECAYS)),
    "templates": Head(fit_blend, blend_logits, _grid(share=tuple(i / (POINTS - 1) for i in range(POINTS)))),
    "cache": Head(
        *_added(remember_shots, cache_scores), _grid(sharpness=(1.5, 4.0, 10.0, 25.0), weight=_SIX)
    ),
    "whitened cache": Head(
        *_added(remember_whitened, whitened_scores),
        _grid(sharpness=(2.0, 6.0), shrink=(0.05, 0.2), weight=_SIX),
    ),
    "Gaussian classifier": Head(
        *_added(remember_gaussians, gaussian_scores), _grid(shrink=(0.05, 0.2, 0.6), weight=_EIGHT)
    ),
    "kernel ridge": Head(
        *_added(remember_ridge, cache_scores), _grid(sharpness=(1.5, 5.0), ridge=(0.1, 1.0), weight=_SIX)
    ),
    "linear probe": Head(fit_probe, probe_logits, _grid(decay=_DECAYS), sees_all=True),
}  # fmt: skip


def megabytes(state: dict) -> float:
    """What a head keeps, in MB of 10⁶ bytes."""
    return sum(math.prod(t.shape) * t.element_size() for t in state.values()) / 1e6
