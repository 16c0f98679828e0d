"""SpotlighterWrapper: the method around one host."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SpotlighterConfig
from .hosts import adapter_for
from .method import activation, losses
from .method.mapping import build_mapping
from .method.match import SHARPNESSES, ShotMemory, choose, describe, place_in_class, resemblance, unjudged, votes
from .method.memory import NamedClasses, SemanticMemoryBank, affinity
from .method.token_stream import TokenStream, check_tower


class Plugin(nn.Module):
    """What Spotlighter adds to a host and saves.

    Attributes:
        bank: prototypes of tokens, as they enter block s.
        memory: the training images' best tokens beside their CLS; None without ``prototype_logits``.
        mapping: what is trained.
    """

    def __init__(self, config: SpotlighterConfig, class_names: list[str], width: int, dim: int, heads: int):
        super().__init__()
        self.bank = SemanticMemoryBank(class_names, config.prototypes, width)
        self.memory = ShotMemory(class_names) if config.prototype_logits else None
        self.mapping = build_mapping(config, width, dim, heads)
        self.cache = {}  # what stays the same between two calls of train() or eval()

    def train(self, mode: bool = True):
        self.cache.clear()
        return super().train(mode)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load mapping and bank; the bank may be of other classes.

        Raises:
            ValueError: the state was trained with another mapping or another backbone.
        """
        self.cache.clear()
        fixed = lambda state: {  # noqa: E731
            name: tuple(value.shape) if name.startswith("mapping.") else "there" for name, value in state.items()
        }
        own, saved = fixed(self.state_dict()), fixed(state_dict)
        wrong = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
        if wrong:
            raise ValueError(
                f"the checkpoint's {wrong[0]} is {saved.get(wrong[0], 'missing')}, this model's "
                f"{own.get(wrong[0], 'missing')}: set TRAINER.SPOTLIGHTER and MODEL.BACKBONE.NAME as in training"
            )
        return super().load_state_dict(state_dict, strict, assign)


@dataclass
class _Step:
    """One batch on its way through the tower."""

    images: Tensor
    text: Tensor  # (C, d), unit length
    scale: Tensor  # 1/τ
    rows: Tensor | None = None  # (B,), the bank's row of each image; None at inference
    tokens: Tensor | None = None  # z of the kept tokens, best first, (B, k, d)
    describes: bool = False  # whether the match needs the image's description
    described: Tensor | None = None  # its m best tokens beside its CLS, (B, m, D); without CLS on the way
    alive: Tensor | None = None  # (B, n) in 0…N-1, the tokens that earlier cuts left; None before any cut
    fused: Tensor | None = None  # the token that stands for the dropped ones, (1, B, w)
    category: Tensor | None = None  # c*, (B,)
    refined: Tensor | None = None  # Û, (P, B, w)
    levels: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # image embedding and tokens of level 1, level 2
    full: Tensor | None = None  # v⁰ before normalization, (B, d)


class SpotlighterWrapper(nn.Module):
    """A host that classifies with the k tokens that matter.

    ``wrapper(images)`` gives logits (B, C). ``wrapper(images, labels)`` gives a dictionary: ``loss`` (Eq. 15), its
    unweighted parts by name, and ``logits``. The host's model is hooked, not changed: called directly it behaves as
    before, and ``detach`` removes the hooks.

    Args:
        host_model: a model that an adapter knows.
        config: hyper-parameters; the default preset if None.
        adapter: an adapter of the caller's own; otherwise ``hosts.adapter_for`` finds one.
        class_names: names of the host's classes in order; the bank is kept by name.

    Raises:
        ValueError: an option does not suit the tower, the tower has no tokens, or no adapter knows the host.
    """

    def __init__(self, host_model, config: SpotlighterConfig | None = None, adapter=None, class_names=None):
        super().__init__()
        self.config = config = config or SpotlighterConfig()
        self.adapter = adapter or adapter_for(host_model, class_names)
        self.class_names = list(class_names or self.adapter.class_names)
        vision = self.adapter.vision
        check_tower(vision)
        blocks = vision.transformer.resblocks
        cuts = config.cuts(len(vision.positional_embedding) - 1, len(blocks))
        self.host = host_model
        self.stream = TokenStream(vision, *(block for block, _ in cuts))
        self._kept_early = [kept for _, kept in cuts[:-1]]
        width, heads = vision.proj.shape[0], self.stream.block.attn.num_heads
        self.plugin = Plugin(config, self.class_names, width, self.adapter.dim, heads)
        self.plugin.to(vision.proj.device).train(host_model.training)
        self.kept: Tensor | None = None
        """Indices (B, k) in 0…N-1 of the tokens that the latest call kept, best first."""
        self.unreached: set[str] = set()
        """Names of losses that reached no trainable parameter in the latest training call and were left out."""

    def detach(self) -> nn.Module:
        """Remove every hook and return the host's model."""
        self.stream.detach()
        return self.host

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the plug-in trains, beside the host's own parameters."""
        return list(self.plugin.parameters())

    def extra_parameter_count(self) -> int:
        """How many trainable parameters the plug-in adds."""
        return sum(parameter.numel() for parameter in self.trainable_parameters())

    def state_dict(self, *args, **kwargs):
        """The plug-in's state alone: mapping, bank and class names. The host's state is ``host.state_dict()``."""
        return self.plugin.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        return self.plugin.load_state_dict(state_dict, strict, assign)

    @torch.no_grad()
    def remember(self, batches) -> int:
        """Write the training images into the memory, as the trained model sees them, in place of what was there.

        Args:
            batches: pairs of images (B, 3, h, w) and the classes (B,) to file them under; of a class the first
                ``match_shots`` are taken.

        Returns:
            The number of images remembered; 0 if nothing is matched.
        """
        plugin, limit = self.plugin, self.config.match_shots
        if plugin.memory is None:
            return 0
        device = plugin.bank.prototypes.device
        seen = torch.zeros(len(self.class_names), dtype=torch.long, device=device)
        described, rows = [], []
        with self._evaluating():
            for images, labels in batches:
                images, labels = images.to(device), labels.to(device)
                new = place_in_class(labels) + seen[labels] < limit
                if not new.any():
                    continue
                step = self._begin(images[new])[1]
                step.describes = True
                self._encode(step)
                described.append(step.described)
                rows.append(labels[new])
                seen += labels[new].bincount(minlength=len(seen))
            if rows:
                sharpness, plugin.memory = plugin.memory.sharpness, ShotMemory(self.class_names).to(device)
                plugin.memory.sharpness.copy_(sharpness)
                plugin.memory.write(torch.cat(described), torch.cat(rows))
        return sum(map(len, rows))

    @torch.no_grad()
    def calibrate(self, batches) -> float | None:
        """Weigh the match with the memory on held-out images of its classes, never on the remembered ones.

        Args:
            batches: pairs of images (B, 3, h, w) and labels (B,), or None for all labels: without them the match is
                given a share of what the texts say (``match.unjudged``).

        Returns:
            The share of these images that the calibrated model gets right; None without labels, or if there is nothing
            to match.
        """
        weight, memory = self.plugin.mapping.match_weight, self.plugin.memory
        weight is None or weight.zero_()
        if not self._match_is_ready():
            return None
        logits, labels, matches, right = [], [], [], None
        with self._evaluating():
            for images, targets in batches:
                step = self._begin(images.to(weight.device))[1]
                image = self._encode(step)
                logits.append(self._logits(image, step.tokens, step))
                labels.append(None if targets is None else targets.to(weight.device))
                matches.append([self._match(step, b) for b in SHARPNESSES])
            if logits:
                logits, matches = torch.cat(logits), [torch.cat(match) for match in zip(*matches, strict=True)]
                if labels[0] is None:
                    sharpness, chosen = SHARPNESSES[1], unjudged(logits, matches[1])
                else:
                    sharpness, chosen, right = choose(logits, torch.cat(labels), matches, self.config.match_slack)
                memory.sharpness.fill_(sharpness)
                weight.fill_(chosen)
        return right

    @contextmanager
    def _evaluating(self):
        """Evaluation mode for a while, with nothing left in the cache that was computed otherwise."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            self.plugin.cache.clear()

    def refresh(self) -> None:
        """Forget cached text embeddings; needed only when prompts change without a call of train() or eval()."""
        self.plugin.cache.clear()

    def forward(self, images: Tensor, labels: Tensor | None = None, extras: dict | None = None):
        raw_text, step = self._begin(images)
        if labels is not None:
            step.rows = self._rows()[self.adapter.assignment_labels(images, labels)]  # (B,)
            step.describes = step.describes and not self.plugin.training  # the memory holds these very images
        image = self._encode(step)  # (B, d)
        with torch.autocast(images.device.type, enabled=False):
            logits = self._logits(image, step.tokens, step)
            if labels is None:
                return logits  # argmax_c of these is Eq. 16
            extras = {"images": images, "text": raw_text, **(extras or {})}
            return self._losses(image, logits, labels, step, extras)

    @torch.no_grad()
    def image_embeddings(self, images: Tensor) -> Tensor:
        """v of images (B, 3, h, w) as classified without labels: (B, d), unit length."""
        return F.normalize(self._encode(self._begin(images)[1]), dim=-1)

    def _begin(self, images: Tensor) -> tuple[Tensor, _Step]:
        """The texts' raw embeddings (C, d), and a batch that is about to enter the tower."""
        constant = not self.adapter.train_text
        raw_text = self._cached("raw text", self.adapter.encode_text, constant)  # (C, d)
        text = self._cached("text", lambda: F.normalize(raw_text.float(), dim=-1), constant)  # (C, d)
        return raw_text, _Step(images, text, self.adapter.logit_scale.float(), describes=self._match_is_ready())

    def _encode(self, step: _Step) -> Tensor:
        """One pass through the tower: v before normalization, (B, d)."""
        early = (partial(self._cut, step, stage, k) for stage, k in enumerate(self._kept_early))
        with self.stream.selecting(*early, lambda hidden: self._choose(hidden, step)) as stream:
            image = self.adapter.encode_image(step.images)  # (B, d)
            if step.describes:
                step.described = describe(step.described, stream.vision.ln_post(stream.output[0]))  # (B, m, D)
            return self._readout(image, stream.output, step.refined)

    # ------------------------------------------------------------------------------------------------- inside the tower

    def _cut(self, step: _Step, stage: int, k: int, hidden: Tensor) -> Tensor:
        """An early stage lets the k best go on, by the sample-wise score alone: (1+n+M, B, w) → (S, B, w)."""
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            scores = activation.standardise(self._sample_score(hidden, step, stage))  # (B, n)
            kept = activation.top_tokens(self._of_tokens(scores, step), k)  # (B, k)
        step.fused = self._fuse(hidden, scores, kept)
        step.alive = self._original(kept, step)
        self._note_for_match(hidden, kept, step)
        return self._sequence(hidden, self.stream.tokens(hidden, kept), step)[0]

    def _note_for_match(self, hidden: Tensor, kept: Tensor, step: _Step) -> None:
        """At the first cut, the best tokens (B, m, w) as the block there sees them."""
        if step.describes and step.described is None:
            best = self.stream.tokens(hidden, kept[:, : self.config.match_tokens])  # (m, B, w)
            step.described = self.stream.stages[0][0].ln_1(best).transpose(0, 1)

    def _of_tokens(self, scores: Tensor, step: _Step) -> Tensor:
        """Scores (B, n) without that of a token which stands for others: (B, n) or (B, n-1)."""
        return scores if step.alive is None else scores[:, : step.alive.shape[1]]

    def _original(self, kept: Tensor, step: _Step) -> Tensor:
        """Positions in the image, 0…N-1, of tokens ``kept`` (B, k) among those that earlier cuts left: (B, k)."""
        return kept if step.alive is None else step.alive.gather(1, kept)

    def _fuse(self, hidden: Tensor, scores: Tensor, kept: Tensor) -> Tensor | None:
        if not self.config.fuse_dropped or kept.shape[1] == scores.shape[1]:
            return None
        return activation.fuse_dropped(hidden[1 : 1 + self.stream.n_now], scores, kept)

    def _choose(self, hidden: Tensor, step: _Step) -> Tensor:
        """Score the tokens that enter block s and give the sequence that goes on: (1+n+M, B, w) → (S, B, w)."""
        config, stream, training = self.config, self.stream, step.rows is not None
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            sample = self._sample_score(hidden, step)  # (B, n)
            scores = activation.standardise(sample)
            if self._has_semantics():
                every = hidden[1 : 1 + stream.n_now]  # (n, B, w)
                scores = scores + activation.standardise(self._semantic_score(hidden, every, step))
            kept = activation.top_tokens(self._of_tokens(scores, step), config.top_k)  # tok^act, (B, k)
            dropped = scores, kept
            self._note_for_match(hidden, kept, step)
            if training and self.plugin.training and config.uses_bank:
                chosen = stream.tokens(hidden, kept).transpose(0, 1)  # (B, k, w)
                self.plugin.bank.update(chosen, self._project(chosen), step.rows, config.beta, self._project)
                self.plugin.cache.pop("prototypes", None)
            if config.recalculate and self._has_semantics() and (training or config.levels != "1+2"):
                semantic = self._semantic_score(hidden, stream.tokens(hidden, kept), step)
                again = activation.standardise(sample.gather(1, kept)) + activation.standardise(semantic)
                kept = kept.gather(1, activation.top_tokens(again, config.top_k))
            if self.plugin.mapping.irm is not None and not self.plugin.bank.is_empty:
                step.category = self._match_category(hidden)
            if not training:
                kept = activation.split_levels(kept, config.levels)
            self.kept = self._original(kept, step)
        step.fused = self._fuse(hidden, *dropped)
        tokens = stream.tokens(hidden, kept)  # (k, B, w)
        if self._reads_tokens(training):
            step.tokens = self._project(tokens).transpose(0, 1)  # (B, k, d)
        stream.head_scale = self.plugin.mapping.head_scale()
        sequence, step.refined = self._sequence(hidden, tokens, step)
        if training:
            self._further_passes(hidden, tokens, sequence, step)
        return sequence

    def _sequence(self, hidden: Tensor, tokens: Tensor, step: _Step) -> tuple[Tensor, Tensor | None]:
        """The sequence on given tokens (k, B, w), and Û (P, B, w) of these tokens, Eq. 8-10."""
        entering = tokens if step.fused is None else torch.cat([tokens, step.fused])  # (k, B, w) or (k+1, B, w)
        if step.category is None:
            return self.stream.sequence(hidden, entering), None
        prototypes, filled = self.plugin.bank.of(step.category)  # (B, P, w), (B, P)
        present = filled.unsqueeze(-1).to(prototypes.dtype)
        mean = (prototypes * present).sum(1, keepdim=True) / present.sum(1, keepdim=True)
        prototypes = torch.where(filled.unsqueeze(-1), prototypes, mean).transpose(0, 1).to(hidden.dtype)  # (P, B, w)
        refined = self.plugin.mapping.irm(prototypes, tokens, self.stream.block)
        extra = refined if self.config.prototypes_in == "sequence" else None
        return self.stream.sequence(hidden, entering, extra), refined

    def _further_passes(self, hidden: Tensor, tokens: Tensor, sequence: Tensor, step: _Step) -> None:
        """Training only: each level alone for L_gra, and all tokens without gradient for v⁰."""
        stream, mapping = self.stream, self.plugin.mapping
        upper = (len(tokens) + 1) // 2
        for name, part in (("gra_high", slice(None, upper)), ("gra_low", slice(upper, None))):
            if self._wants("gra") or self._wants(name):
                level, refined = self._sequence(hidden, tokens[part], step)
                image, output = stream.tail(level)
                image = self._readout(self.adapter.project(image), output, refined)
                step.levels.append((image, None if step.tokens is None else step.tokens[:, part]))
        learns = (
            sequence.requires_grad
            or mapping.head_scale() is not None
            or (step.refined is not None and mapping.readout_weight is not None)
            or any(parameter.requires_grad for block in stream.tail_blocks for parameter in block.parameters())
            or any(parameter.requires_grad for parameter in stream.vision.ln_post.parameters())
        )
        if self._wants("kl_visual") and learns:
            scale, stream.head_scale = stream.head_scale, None
            with torch.no_grad():
                step.full = self.adapter.project(stream.whole())
            stream.head_scale = scale

    def _sample_score(self, hidden: Tensor, step: _Step, stage: int = -1) -> Tensor:
        """Sample-wise score of what enters a stage's block, (B, n); gates on heads are those of block s."""
        config, vision = self.config, self.stream.vision
        block, n = self.stream.stages[stage][0], self.stream.n_now
        heads = self.plugin.mapping.head_scale() if stage == -1 else None
        match config.activation:
            case "attention":
                return activation.attention_score(hidden, block, n, heads)
            case "contribution":
                target, sign = self._pulled_back(hidden, self._target(hidden, step)), config.contribution_sign
                return activation.contribution_score(hidden, block, vision, target, n, heads, sign)
            case "lens":
                tokens = self._project(hidden[1 : 1 + n]).transpose(0, 1)  # (B, n, d)
                return activation.lens_score(tokens, self._target(hidden, step))
            case "value":
                target = self._target(hidden, step)
                return activation.value_score(hidden, block, self._project, target, n)
            case "random":
                return activation.random_score(activation.image_keys(step.images), n, config.seed)

    def _has_semantics(self) -> bool:
        return self.config.semantic_activation and not self.plugin.bank.is_empty

    def _semantic_score(self, hidden: Tensor, tokens: Tensor, step: _Step) -> Tensor:
        """Semantic-wise score of tokens (n, B, w): (B, n)."""
        category = self._match_category(hidden)
        prototypes, filled = self._prototypes()[category], self.plugin.bank.filled[category]
        target = self._target(hidden, step)
        return activation.semantic_score(self._project(tokens).transpose(0, 1), prototypes, filled, target, step.scale)

    def _target(self, hidden: Tensor, step: _Step) -> Tensor:
        """t̂ of each image, as CLS sees it on entering block s: (B, d)."""
        return activation.expected_text(self._project(hidden[0]), step.text, step.scale)

    def _pulled_back(self, hidden: Tensor, target: Tensor) -> Tensor:
        """The direction in the tower's own joint space that leads to t̂ after the host's projection: (B, d)."""
        with torch.enable_grad():
            joint = activation.read_out(hidden[0].detach(), self.stream.vision).detach().requires_grad_()
            return torch.autograd.grad((self.adapter.project(joint).float() * target).sum(), joint)[0].float()

    def _match_category(self, hidden: Tensor) -> Tensor:
        return activation.match_category(self._project(hidden[0]), self._prototypes(), self.plugin.bank.filled)

    # -------------------------------------------------------------------------------------------------- after the tower

    def _readout(self, image: Tensor, output: Tensor, refined: Tensor | None) -> Tensor:
        """v before normalization: π(CLS) + α_v mean_p π(Û), (B, d) float32."""
        image, weight = image.float(), self.plugin.mapping.readout_weight
        if refined is None or weight is None:
            return image
        if self.config.prototypes_in == "sequence":
            refined = output[1 : 1 + len(refined)]  # Û as block L-1 leaves it
        joint = self.adapter.project(activation.read_out(refined, self.stream.vision))  # (P, B, d)
        return image + weight * joint.float().mean(0)

    def _logits(self, image: Tensor, tokens: Tensor | None, step: _Step) -> Tensor:
        """cos(v, t^rep)/τ, and the weighed match with the memory where it is wanted: (B, d), (B, k, d) → (B, C)."""
        mapping, memory = self.plugin.mapping, self.plugin.memory
        logits = step.scale * mapping.text(step.text, tokens, step.scale).cosine(image, mapping.joint_gate())  # (B, C)
        if not step.describes:
            return logits
        return logits + mapping.match_weight * self._match(step, self._cached("sharpness", memory.sharpness.item))

    def _match_is_ready(self) -> bool:
        """Whether something is matched, something is remembered, and the model has a class of the memory's."""
        memory = self.plugin.memory
        if memory is None or memory.is_empty:
            return False
        return self._cached(
            "is known", lambda: any(row >= 0 for row in memory.columns(self.class_names)), constant=True
        )

    def _match(self, step: _Step, sharpness: float) -> Tensor:
        """The match in the model's own classes, 0 for those that the memory does not know: (B, C)."""
        memory = self.plugin.memory
        cosines, classes = resemblance(memory.look(step.described), memory, self._cached("coarse", memory.coarse))
        match = votes(cosines, classes, sharpness, len(memory.keys))
        rows = self._cached("memory's rows", lambda: self._rows_of(memory))  # (C,)
        return match[:, rows.clamp(min=0)] * (rows >= 0)

    def _losses(self, image: Tensor, logits: Tensor, labels: Tensor, step: _Step, extras: dict) -> dict[str, Tensor]:
        config, adapter, mapping = self.config, self.adapter, self.plugin.mapping
        parts = {"cls": adapter.objective(logits, labels, extras)}  # Eq. 12
        if step.levels:
            level_logits = [self._logits(*level, step) for level in step.levels]
            name = next(name for name in config.losses if name in losses.GRA)
            parts[name] = sum(adapter.classification_loss(level, labels, extras) for level in level_logits)
        if self._wants("reg_text"):
            text = mapping.text(step.text, step.tokens, step.scale).mean()
            parts["reg_text"] = losses.text_regularisation(text, adapter.frozen_text())
        if step.full is not None:
            full = F.normalize(step.full.float(), dim=-1)
            image = F.normalize(image, dim=-1)
            parts["kl_visual"] = losses.visual_divergence(image, full, adapter.frozen_text(), step.scale)
        if self._wants("local"):
            parts["local"] = self._local_loss(step)
        parts = {name: value for name, value in parts.items() if value.requires_grad}
        self.unreached = {name for name in ("cls", *config.losses) if self._wants(name)} - parts.keys()
        total = losses.total_loss(parts, config.lambda1, config.lambda2, config.lambda3)
        return {"loss": total, **parts, "logits": logits}

    def _local_loss(self, step: _Step) -> Tensor:
        bank = self.plugin.bank
        tokens = self._gated(step.tokens)
        match = affinity(tokens, self._gated(self._prototypes()), bank.filled)  # (B, C of the bank)
        if step.refined is not None:
            refined = self._gated(self._project(step.refined).transpose(0, 1))  # (B, P, d)
            match = losses.refine_affinity(match, tokens, refined, step.category)
        return losses.local_loss(match, step.rows, step.scale)

    # ----------------------------------------------------------------------------------------------------- small change

    def _wants(self, loss: str) -> bool:
        weights = {"reg_text": self.config.lambda2, **dict.fromkeys(losses.GRA, self.config.lambda1)}
        return loss == "cls" or (loss in self.config.losses and weights.get(loss, self.config.lambda3) > 0)

    def _reads_tokens(self, training: bool) -> bool:
        """Whether the kept tokens are needed in the joint space."""
        return self.plugin.mapping.mixes_texts or (training and self._wants("local"))

    def _project(self, hidden: Tensor) -> Tensor:
        """π to the texts' space, of unit length: (…, w) → (…, d), float32."""
        return F.normalize(self.adapter.project(activation.read_out(hidden, self.stream.vision)).float(), dim=-1)

    def _gated(self, joint: Tensor) -> Tensor:
        """Unit vectors (…, d) as gates see them, again of unit length."""
        gate = self.plugin.mapping.joint_gate()
        return joint if gate is None else F.normalize(joint * gate, dim=-1)

    def _prototypes(self) -> Tensor:
        """π(U), (C, P, d)."""
        return self._cached("prototypes", lambda: self._project(self.plugin.bank.prototypes))

    def _rows(self) -> Tensor:
        """Row of the bank for each of the model's classes, -1 for none: (C,)."""
        return self._cached("rows", lambda: self._rows_of(self.plugin.bank), constant=True)

    def _rows_of(self, kept: NamedClasses) -> Tensor:
        return torch.tensor(kept.columns(self.class_names), device=kept.names.device)

    def _cached(self, name: str, make, constant: bool = False) -> Tensor:
        """Keep what ``make`` gives, if it is constant or nothing is being trained."""
        if not constant and (self.plugin.training or torch.is_grad_enabled()):
            return make()
        cache = self.plugin.cache
        if name not in cache:
            cache[name] = make()
        return cache[name]
