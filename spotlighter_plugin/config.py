"""Every hyper-parameter of Spotlighter, its symbol in the paper, its presets and its checks."""

import math
from dataclasses import dataclass, fields
from itertools import pairwise

from .method.schedule import Step, Tower, place, steps

ACTIVATIONS = ("attention", "lens", "random")
MAPPINGS = ("none", "full", "linear+linear", "transformer+transformer", "transformer+linear")
LEVELS = ("1+2", "1", "2")
MOST = 10**9  # of whole numbers
PLACING = ("select_block", "top_k", "stages", "merge")  # what ``share`` stands for
LOSSES = ("gra", "gra_low", "gra_high", "reg_text", "kl_visual", "local")

# An option that is left at None takes its preset's value; what ``default`` does not name is as in ``paper``.
PAPER = {
    "top_k": 32,
    "prototypes": 4,
    "select_block": -1,
    "alpha": 0.2,
    "beta": 0.8,
    "lambda1": 0.02,
    "lambda2": 20.0,
    "lambda3": 0.1,
    "mapping": "full",
    "levels": "1+2",
    "activation": "lens",
    "semantic_activation": True,
    "recalculate": True,
    "prototypes_in": "sequence",
    "prototype_logits": False,
    "losses": ("gra", "reg_text", "kl_visual", "local"),
    "stages": (),
    "merge": 0,
    "share": 0.0,
    "fuse_dropped": False,
}
PRESETS = {
    "paper": PAPER,
    "default": {
        **PAPER,
        "top_k": 48,
        "mapping": "none",
        "activation": "attention",
        "semantic_activation": False,
        "recalculate": False,
        "prototypes_in": "none",
        "prototype_logits": True,
        "losses": (),
        "share": 0.7,
        "fuse_dropped": True,
    },
}
GONE = {"fast": "set PRESET default with SELECT_BLOCK 4 and TOP_K 32"}  # presets of version 0.1


@dataclass
class SpotlighterConfig:
    """Hyper-parameters of Spotlighter. Options left at ``None`` take the value of ``preset`` (see ``PRESETS``).

    Raises:
        ValueError: one line naming the option, its value and what is allowed.
    """

    preset: str = "default"
    """``paper`` (the paper's reading of every step) or ``default``."""
    top_k: int | None = None
    """k, tokens kept per image; at least 2, at most the tower's tokens."""
    prototypes: int | None = None
    """P, prototypes per class in the Semantic Memory Bank."""
    select_block: int | None = None
    """s, block of the vision transformer before which tokens are selected; negative counts from the end. Paper: -1."""
    alpha: float | None = None
    """α in [0, 1], weight of the text residual, Eq. 11. Paper: 0.2."""
    beta: float | None = None
    """β in [0, 1], momentum of the prototypes, Eq. 6. Paper: 0.8."""
    lambda1: float | None = None
    """λ1 ≥ 0, weight of L_gra, Eq. 15. Paper: 0.02."""
    lambda2: float | None = None
    """λ2 ≥ 0, weight of L_reg_text, Eq. 15. Paper: 20."""
    lambda3: float | None = None
    """λ3 ≥ 0, weight of L_KL_visual + L_local, Eq. 15. Paper: 0.1."""
    mapping: str | None = None
    """IRM and TRM, Eq. 8-11: one of ``MAPPINGS``."""
    levels: str | None = None
    """Tokens used at inference: ``1`` the upper half, ``2`` the lower half, ``1+2`` all k in one pass."""
    activation: str | None = None
    """Sample-wise score of a token: one of ``ACTIVATIONS``."""
    semantic_activation: bool | None = None
    """Add the semantic-wise score, which compares tokens with the prototypes of the matched class (Table VIII)."""
    recalculate: bool | None = None
    """Match and score the kept tokens once more with the updated prototypes before levels are cut (Table XII)."""
    prototypes_in: str | None = None
    """Where the refined prototypes Û enter, Eq. 10: ``sequence``, ``readout`` or ``none``."""
    prototype_logits: bool | None = None
    """Add what the memory of the classes' training images says, weighed by classes and shots left out
    (``SpotlighterWrapper.remember``)."""
    losses: tuple[str, ...] | None = None
    """Auxiliary losses of Eq. 15 in use: names among ``LOSSES``; L_cls is always there, in ``default`` alone.
    ``gra`` is ``gra_low``, level 2 alone, and ``gra_high``, level 1 alone."""
    stages: tuple[tuple[int, int | float], ...] | None = None
    """Earlier cuts on the way to ``select_block`` and ``top_k``: pairs (block, tokens kept), blocks as in
    ``select_block``. ``((3, 64),)`` keeps 64 tokens before block 3, by the sample-wise score there; ``((3, 0.5),)``
    half of the tower's tokens, though never fewer than the next cut. A preset's stages go with its ``select_block``:
    where that is given, there are none."""
    merge: int | None = None
    """r ≥ 0, tokens that are merged with those most like them before each of blocks 1…s-1 that has no cut, though never
    more than half of what is left. A preset's goes with its ``select_block``, like its stages."""
    share: float | None = None
    """Share of the host's operations in the vision tower, in (0, 1), that is to be spent: places merges and a cut in a
    tower of whatever depth and number of tokens (``method.schedule.place``), in the place of ``select_block``,
    ``top_k``, ``stages`` and ``merge``, which are None then. 0: these say."""
    fuse_dropped: bool | None = None
    """Let the tokens that a cut drops go on as one, their mean weighted by their scores."""
    match_shots: int = 16
    """V, from how many training images of a class it learns."""
    lr_multiplier: float = 1.0
    """Learning rate of the plug-in's parameters as a multiple of the host's."""
    seed: int = 0
    """Seed of ``activation: random``."""

    def __post_init__(self):
        if self.preset in tuple(GONE):
            raise ValueError(f"{_option('preset')} = {self.preset!r} is gone: {GONE[self.preset]}")
        _one_of("preset", self.preset, tuple(PRESETS))
        self._given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        placing = [name for name in PLACING if getattr(self, name) is not None]
        if self.share and placing:
            given = ", ".join(name.upper() for name in placing)
            raise ValueError(f"{_option('share')} = {self.share}: it places merges and cuts itself; leave out {given}")
        if placing and self.share is None:
            self.share = 0.0
        if self.select_block is not None:
            self.stages = () if self.stages is None else self.stages
            self.merge = 0 if self.merge is None else self.merge
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.levels = str(self.levels)
        self.losses = _losses(self.losses)
        _one_of("mapping", self.mapping, MAPPINGS)
        _one_of("levels", self.levels, LEVELS)
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("prototypes_in", self.prototypes_in, ("sequence", "readout", "none"))
        for name, low, high in (
            ("top_k", 2, MOST),
            ("prototypes", 1, 1000),
            ("select_block", -MOST, MOST),
            ("seed", -MOST, MOST),
            ("alpha", 0, 1),
            ("beta", 0, 1),
            ("lambda1", 0, 10**6),
            ("lambda2", 0, 10**6),
            ("lambda3", 0, 10**6),
            ("merge", 0, MOST),
            ("match_shots", 1, MOST),
            ("lr_multiplier", 0, 10**6),
        ):
            whole = name in ("top_k", "prototypes", "select_block", "merge", "match_shots", "seed")
            _number(name, getattr(self, name), low, high, whole)
        _number("share", self.share, 0, 1, False)
        self.stages = _stages(self.stages, self.top_k)
        if self.share:
            self.select_block = self.top_k = self.stages = self.merge = None
        for name in ("semantic_activation", "recalculate", "prototype_logits", "fuse_dropped"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{_option(name)} = {getattr(self, name)!r}: expected True or False")

    def idle(self, unreached: frozenset[str] = frozenset()) -> list[str]:
        """Options that were given and change nothing beside the others.

        unreached: losses that reach nothing that is trained.
        """
        losses = set(self.losses) - set(unreached)
        has_irm = self.mapping != "none" and self.prototypes_in != "none"
        has_bank = self.semantic_activation or has_irm or "local" in losses
        has_levels = self.levels != "1+2" or any(loss.startswith("gra") for loss in losses)
        is_read = {
            "prototypes": has_bank,
            "beta": has_bank,
            "alpha": self.mapping != "none",
            "prototypes_in": self.mapping != "none",
            "lr_multiplier": self.mapping != "none",
            "lambda1": any(loss.startswith("gra") for loss in losses),
            "lambda2": "reg_text" in losses,
            "lambda3": not losses.isdisjoint(("kl_visual", "local")),
            "recalculate": self.semantic_activation and has_levels,
            "match_shots": self.prototype_logits,
            "seed": self.activation == "random",
        }
        return [_option(name) for name, read in is_read.items() if name in self._given and not read]

    @property
    def lambdas(self) -> tuple[float, float, float]:
        """λ1, λ2, λ3."""
        return self.lambda1, self.lambda2, self.lambda3

    @property
    def uses_bank(self) -> bool:
        """Whether anything may read the bank's prototypes."""
        has_irm = self.mapping != "none" and self.prototypes_in != "none"
        return self.semantic_activation or has_irm or ("local" in self.losses and self.lambda3 > 0)

    def weight_of(self, loss: str) -> float:
        """λ of an auxiliary loss of Eq. 15, by its name in ``LOSSES``."""
        return self.lambda1 if loss.startswith("gra") else self.lambda2 if loss == "reg_text" else self.lambda3

    def steps(self, tower: Tower) -> list[Step]:
        """Before which blocks a tower's tokens are merged or cut; the last is before block s.

        Raises:
            ValueError: k exceeds the tokens, a block does not exist, a stage does not come before the next, or no
                schedule of this tower spends ``share``.
        """
        if self.share:
            return steps(tower, *place(self.share, tower, self.fuse_dropped, "share" in self._given), self.fuse_dropped)
        return steps(tower, self.cuts(tower.tokens, tower.blocks), self.merge, self.fuse_dropped)

    def cuts(self, n_tokens: int, n_blocks: int) -> list[tuple[int, int]]:
        """Where, without ``share``, a tower of ``n_tokens`` patch tokens and ``n_blocks`` blocks is cut.

        Returns:
            Pairs (block, tokens kept): the blocks before which tokens are cut, in [0, n_blocks) and ascending. The last
            pair is (s, k).

        Raises:
            ValueError: k exceeds the tokens, a block does not exist, or a stage does not come before the next.
        """
        cuts = [(self.select_block, self.top_k)]
        for block, kept in reversed(self.stages):
            kept = max(math.ceil(kept * n_tokens), cuts[0][1]) if isinstance(kept, float) else kept
            cuts.insert(0, (block, kept))
        for i, (block, kept) in reversed(list(enumerate(cuts))):  # a share may have its number from a later cut
            is_last = i == len(self.stages)
            if kept > n_tokens:
                name = "top_k" if is_last else "stages"
                raise ValueError(
                    f"{_option(name)} = {getattr(self, name)}: the vision tower has {n_tokens} tokens; "
                    f"take at most {n_tokens}"
                )
            if not -n_blocks <= block < n_blocks:
                name = "select_block" if is_last else "stages"
                raise ValueError(
                    f"{_option(name)} = {getattr(self, name)}: the vision tower has {n_blocks} blocks; "
                    f"take {-n_blocks} to {n_blocks - 1}"
                )
        cuts = [(block % n_blocks, kept) for block, kept in cuts]
        blocks = [block for block, _ in cuts]
        if any(later <= earlier for earlier, later in pairwise(blocks)):
            raise ValueError(
                f"{_option('stages')} = {self.stages}, SELECT_BLOCK {self.select_block}: of {n_blocks} blocks these "
                f"are {', '.join(map(str, blocks))}; each must come before the next"
            )
        if any(later > earlier for (_, earlier), (_, later) in pairwise(cuts)):
            raise ValueError(_growing(self.stages, self.top_k))
        return cuts


def extend_cfg(cfg) -> None:
    """Add the node ``TRAINER.SPOTLIGHTER`` to a yacs configuration; ``None`` means: the preset's value."""
    from yacs.config import CfgNode

    cfg.TRAINER.SPOTLIGHTER = CfgNode({field.name.upper(): field.default for field in fields(SpotlighterConfig)})


def from_cfg(cfg) -> SpotlighterConfig:
    """The validated configuration of a yacs tree; a tree without ``TRAINER.SPOTLIGHTER`` gives the default preset."""
    node = cfg.TRAINER.get("SPOTLIGHTER", {})
    return SpotlighterConfig(**{name.lower(): value for name, value in node.items()})


def _option(name: str) -> str:
    return f"TRAINER.SPOTLIGHTER.{name.upper()}"


def _one_of(name: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{_option(name)} = {value!r}: expected one of {', '.join(allowed)}")


def _losses(value) -> tuple[str, ...]:
    names = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"{_option('losses')} = {value!r}: expected names among {', '.join(LOSSES)}")
    for loss in names:
        _one_of("losses", loss, LOSSES)
    if "gra" in names or {"gra_low", "gra_high"} <= set(names):
        return ("gra", *(loss for loss in names if not loss.startswith("gra")))
    return tuple(names)


def _stages(value, top_k: int) -> tuple[tuple[int, int | float], ...]:
    """Pairs (block, tokens kept or a share of them); numbers fall, the last of them to no less than ``top_k``."""
    if not isinstance(value, (list, tuple)) or not all(map(_is_stage, value)):
        raise ValueError(
            f"{_option('stages')} = {value!r}: expected pairs (block, tokens kept) as in ((3, 64),), "
            "or a share of the tokens, above 0 and below 1, as in ((3, 0.5),)"
        )
    kept = [k for _, k in value if isinstance(k, int)] + [top_k]
    if kept != sorted(kept, reverse=True):
        raise ValueError(_growing(value, top_k))
    return tuple((block, k) for block, k in value)


def _is_stage(pair) -> bool:
    if not isinstance(pair, (list, tuple)) or [type(part) for part in pair] not in ([int, int], [int, float]):
        return False
    return type(pair[1]) is int or 0 < pair[1] < 1


def _growing(stages, top_k: int) -> str:
    return f"{_option('stages')} = {stages!r}, TOP_K {top_k}: each must keep at most what the one before did"


def _number(name: str, value, low, high, whole: bool) -> None:
    right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right_type or not low <= value <= high:
        kind = "whole number" if whole else "number"
        raise ValueError(f"{_option(name)} = {value!r}: expected a {kind} from {low} to {high}")
