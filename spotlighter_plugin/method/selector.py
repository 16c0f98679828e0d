"""What happens inside the tower to one batch: sequences that enter its blocks come in, those that go on go out.

A ``Selector`` lives for one call and holds all that belongs to it, so calls never meet.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activation, merging
from .layout import Gaze, Layout
from .merging import Plan
from .plugin import Plugin
from .schedule import Step
from .token_stream import Pass


def gazes_of(layout: Layout, steps: list[Step]) -> dict[int, Gaze]:
    """By block: whose keys are compared where tokens are merged, and who looks where they are cut."""
    return {step.block: (Layout.gaze if step.merges else type(layout).gaze)(layout, step.block) for step in steps}


@dataclass
class Selector:
    """One batch on its way; ``choices`` are what the token stream calls before each cut's block.

    Attributes:
        tokens: z of the kept tokens, best first, (B, k, d), where something reads them.
        trail: what became of the image's patches, as ``merging.whereabouts`` takes it.
        levels: image embedding and tokens of level 1 and level 2 alone; in training.
        full: v⁰ before normalization, (B, d); in training.
        category: c*, (B,).
        refined: Û, (P, B, w).
        own_logits: the host's own, (B, C), where it gives more than an embedding.
    """

    config: object
    plugin: Plugin
    layout: Layout
    to_texts: Callable[[Tensor], Tensor]  # from the tower's joint space to that of the texts
    constant: Callable[[str, Callable], Tensor]  # what stays the same while nothing is trained
    steps: list[Step]
    gazes: dict[int, Gaze]  # ``gazes_of`` them
    images: Tensor
    text: Tensor  # (C, d), unit length
    scale: Tensor  # 1/τ
    bias: Tensor | float = 0.0  # added to every logit
    rows: Tensor | None = None  # (B,), the bank's row of each image; None at inference
    wants: frozenset[str] = frozenset()  # names of the losses to come
    recalls: bool = False  # whether the memory adds to the logits
    gather: Callable[[Tensor], Tensor] = lambda rows: rows  # images' rows here → those of all parts of the batch
    mean: Callable[[Tensor], Tensor] = lambda value: value  # a mean over the images here → over those of all parts
    templates: Callable[[], Tensor | None] = lambda: None  # texts of hand-written templates, (C, d)
    tokens: Tensor | None = None
    trail: list[Plan | Tensor] = field(default_factory=list)
    levels: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    full: Tensor | None = None
    category: Tensor | None = None
    refined: Tensor | None = None
    own_logits: Tensor | None = None
    _fused: Tensor | None = None  # the token that stands for the dropped ones, (1, B, w)

    def choices(self) -> list[Callable[[Pass, Tensor], Tensor]]:
        """A choice per step; the last is before block s."""
        early = [partial(self.merge if step.merges else self.cut, step) for step in self.steps[:-1]]
        return [*early, partial(self.select, self.steps[-1])]

    def merge(self, step: Step, tower: Pass, hidden: Tensor) -> Tensor:
        """The tokens that are most alike go on as one: (1+n+M, B, w) → (S, B, w)."""
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            keys = merging.keys_of(hidden, self.gazes[step.block])
            sizes = keys.new_ones(keys.shape[:2], dtype=torch.float32) if tower.sizes is None else tower.sizes
            alone = self.layout.n_lead, tower.n_prompts + step.fused
            plan = merging.match(keys, sizes, step.tokens - step.left, alone)
        hidden, tower.sizes = merging.merge(hidden, sizes, plan)
        self.trail.append(plan)
        return hidden

    def cut(self, step: Step, tower: Pass, hidden: Tensor) -> Tensor:
        """An early cut lets the k best go on, by the sample-wise score alone: (1+n+M, B, w) → (S, B, w)."""
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            scores = activation.standardise(self.sample_score(tower, hidden))  # (B, n)
            kept = activation.top_tokens(self._of_tokens(scores), step.kept)  # (B, k)
        self._fused = self._fuse(tower, hidden, scores, kept)
        self.trail.append(kept)
        sequence, tower.sizes, _ = self._sequence(tower, hidden, tower.tokens(hidden, kept), kept)
        return sequence

    def select(self, step: Step, tower: Pass, hidden: Tensor) -> Tensor:
        """Score the tokens that enter block s and give the sequence that goes on: (1+n+M, B, w) → (S, B, w)."""
        config, bank, training = self.config, self.plugin.bank, self.rows is not None
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            sample = self.sample_score(tower, hidden)  # (B, n)
            scores = activation.standardise(sample)
            if self.has_semantics:
                every = tower.patches(hidden)  # (n, B, w)
                scores = scores + activation.standardise(self.semantic_score(hidden, every))
            kept = activation.top_tokens(self._of_tokens(scores), step.kept)  # tok^act, (B, k)
            dropped = scores, kept
            if training and self.plugin.training and self._bank_is_read(hidden):
                chosen = self.gather(tower.tokens(hidden, kept).transpose(0, 1))  # (B, k, w)
                bank.update(chosen, self.project(chosen), self.gather(self.rows), config.beta, self.project)
            if config.recalculate and self.has_semantics and (training or config.levels != "1+2"):
                semantic = self.semantic_score(hidden, tower.tokens(hidden, kept))
                again = activation.standardise(sample.gather(1, kept)) + activation.standardise(semantic)
                kept = kept.gather(1, activation.top_tokens(again, step.kept))
            if self.plugin.mapping.irm is not None and not bank.is_empty:
                self.category = self._match_category(hidden)
            if not training:
                kept = activation.split_levels(kept, config.levels)
        self.trail.append(kept)
        self._fused = self._fuse(tower, hidden, *dropped)
        tokens = tower.tokens(hidden, kept)  # (k, B, w)
        if self.plugin.mapping.trm is not None or "local" in self.wants:
            self.tokens = self.project(tokens).transpose(0, 1)  # (B, k, d)
        sequence, sizes, self.refined = self._sequence(tower, hidden, tokens, kept)
        if training:
            self._further_passes(tower, hidden, tokens, kept, sequence)
        tower.sizes = sizes
        return sequence

    def image(self, image: Tensor, tower: Pass) -> Tensor:
        """v before normalization, (B, d) float32, of what the host made of the output."""
        return self._readout(image, tower.output, self.refined)

    def logits(self, image: Tensor, tokens: Tensor | None) -> Tensor:
        """cos(v, t^rep)/τ, or the host's own, and what the memory says if it is asked: (B, d), (B, k, d) → (B, C)."""
        memory, mapping, unit = self.plugin.memory, self.plugin.mapping, F.normalize(image, dim=-1)
        texts, evidence = self.recollection()
        if self.own_logits is not None:
            logits = self.own_logits.float()
        elif texts is not None:
            logits = self.scale * memory.cosine(unit, texts) + self.bias
        else:
            logits = self.scale * mapping.text(self.text, tokens, self.scale).cosine(image) + self.bias
        return logits if evidence is None else memory.add_to(logits, unit, evidence)

    def recollection(self) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """What the memory makes of the texts, (C, d), where no mapping does, and its evidence; None for what is not."""
        memory, texts = self.plugin.memory, None
        if not self.recalls:
            return None, None
        if self.plugin.mapping.trm is None:
            texts = self.constant("seen texts", lambda: memory.texts(self.text, self._said_otherwise()))
        return texts, self.constant("evidence", memory.evidence, False)

    def _said_otherwise(self) -> Tensor | None:
        """The template ensemble, if the memory was weighed with it; a warning where nobody gave it."""
        if not self.plugin.memory.uses_templates:
            return None
        texts = self.templates()
        if texts is None:
            warnings.warn("the memory was weighed with templates, none are given: adapter.set_templates", stacklevel=2)
        return texts

    # ----------------------------------------------------------------------------------------------------------- scores

    def sample_score(self, tower: Pass, hidden: Tensor) -> Tensor:
        """Sample-wise score of what enters the present cut's block, (B, n)."""
        n = tower.n_now
        match self.config.activation:
            case "attention":
                bias = None if tower.sizes is None else tower.sizes.log()
                scores = activation.attention_score(hidden, self.gazes[tower.index], bias)  # (B, S)
                return scores[:, self.layout.n_lead :][:, :n]
            case "lens":
                tokens = self.project(tower.patches(hidden)).transpose(0, 1)  # (B, n, d)
                return activation.lens_score(tokens, self._target(hidden))
            case "random":
                return activation.random_score(activation.image_keys(self.images), n, self.config.seed)

    def semantic_score(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Semantic-wise score of tokens (n, B, w): (B, n)."""
        category = self._match_category(hidden)
        prototypes, filled = self.prototypes[category], self.plugin.bank.filled[category]
        joint = self.project(tokens).transpose(0, 1)  # (B, n, d)
        return activation.semantic_score(joint, prototypes, filled, self._target(hidden), self.scale)

    @property
    def has_semantics(self) -> bool:
        return self.config.semantic_activation and not self.plugin.bank.is_empty

    @property
    def prototypes(self) -> Tensor:
        """π(U), (C, P, d)."""
        return self.constant("prototypes", lambda: self.project(self.plugin.bank.prototypes))

    def project(self, hidden: Tensor) -> Tensor:
        """π to the texts' space, of unit length: (…, w) → (…, d), float32."""
        return F.normalize(self.to_texts(self.layout.read_out(hidden)).float(), dim=-1)

    def _target(self, hidden: Tensor) -> Tensor:
        """t̂ of each image, as CLS sees it on entering the block: (B, d)."""
        return activation.expected_text(self.project(self.layout.summary(hidden)), self.text, self.scale)

    def _match_category(self, hidden: Tensor) -> Tensor:
        return activation.match_category(
            self.project(self.layout.summary(hidden)), self.prototypes, self.plugin.bank.filled
        )

    def _bank_is_read(self, hidden: Tensor) -> bool:
        """Whether anything reads the prototypes; L_local does where it reaches something that is trained."""
        if self.config.semantic_activation or self.plugin.mapping.irm is not None:
            return True
        with torch.enable_grad():
            return "local" in self.wants and self.project(self.layout.summary(hidden[:, :1])).requires_grad

    # -------------------------------------------------------------------------------------------------------- sequences

    def _sequence(self, tower: Pass, hidden: Tensor, tokens: Tensor, kept: Tensor) -> tuple:
        """The sequence on given tokens (k, B, w), its sizes, and Û (P, B, w) of these tokens, Eq. 8-10.

        kept: (B, k), which of the tokens that came in these are.
        """
        if self.category is None:
            return tower.sequence(hidden, tokens, None, self._fused), self._sizes(tower, kept), None
        prototypes, filled = self.plugin.bank.of(self.category)  # (B, P, w), (B, P)
        present = filled.unsqueeze(-1).to(prototypes.dtype)
        mean = (prototypes * present).sum(1, keepdim=True) / present.sum(1, keepdim=True)
        prototypes = torch.where(filled.unsqueeze(-1), prototypes, mean).transpose(0, 1).to(hidden.dtype)  # (P, B, w)
        refined = self.plugin.mapping.irm(prototypes, tokens, self.layout, tower.index)
        extra = refined if self.config.prototypes_in == "sequence" else hidden[:0]
        return tower.sequence(hidden, tokens, extra, self._fused), self._sizes(tower, kept, len(extra)), refined

    def _sizes(self, tower: Pass, kept: Tensor, extra: int = 0) -> Tensor | None:
        """Sizes of the sequence [CLS, extra, kept, fused, prompts]; what is no token of the image counts once."""
        sizes, lead = tower.sizes, self.layout.n_lead
        if sizes is None:
            return None
        sizes = sizes[:, lead : lead + tower.n_now].gather(1, kept)
        behind = tower.n_prompts + (self._fused is not None)
        return F.pad(sizes, (lead + extra, behind), value=1.0)

    def _further_passes(self, tower: Pass, hidden: Tensor, tokens: Tensor, kept: Tensor, sequence: Tensor) -> None:
        """Training only: each level alone for L_gra, and all tokens without gradient for v⁰."""
        upper = (len(tokens) + 1) // 2
        for name, part in (("gra_high", slice(None, upper)), ("gra_low", slice(upper, None))):
            if {"gra", name} & self.wants:
                level, sizes, refined = self._sequence(tower, hidden, tokens[part], kept[:, part])
                image, output = tower.tail(level, sizes)
                image = self._readout(self.to_texts(image), output, refined)
                self.levels.append((image, None if self.tokens is None else self.tokens[:, part]))
        learns = (
            sequence.requires_grad
            or self.refined is not None
            or any(
                parameter.requires_grad
                for block in self.layout.blocks[tower.index :]
                for parameter in block.parameters()
            )
            or any(parameter.requires_grad for parameter in self.layout.norm.parameters())
        )
        if "kl_visual" in self.wants and learns:
            with torch.no_grad():
                self.full = self.to_texts(tower.whole())

    def _readout(self, image: Tensor, output: Tensor, refined: Tensor | None) -> Tensor:
        """v before normalization: π(CLS) + α_v mean_p π(Û), (B, d) float32."""
        image = image.float()
        if refined is None:
            return image
        if self.config.prototypes_in == "sequence":
            refined = output[self.layout.n_lead :][: len(refined)]  # Û as block L-1 leaves it
        joint = self.to_texts(self.layout.read_out(refined))  # (P, B, d)
        return image + self.plugin.mapping.readout_weight * joint.float().mean(0)

    def _of_tokens(self, scores: Tensor) -> Tensor:
        """Scores (B, n) without that of a token which stands for dropped ones: (B, n) or (B, n-1)."""
        return scores if self._fused is None else scores[:, :-1]

    def _fuse(self, tower: Pass, hidden: Tensor, scores: Tensor, kept: Tensor) -> Tensor | None:
        if not self.config.fuse_dropped or kept.shape[1] == scores.shape[1]:
            return None
        return activation.fuse_dropped(tower.patches(hidden), scores, kept)
