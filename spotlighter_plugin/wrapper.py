"""SpotlighterWrapper: the method around one host. It puts things together; what is computed is in method/."""

import warnings
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ranks
from .config import SpotlighterConfig
from .hosts import adapter_for
from .hosts.base import HostAdapter
from .method import losses
from .method.classes import listed
from .method.invariance import check_invariance
from .method.memory import place_in_class, to_weigh_by, weighed_classes
from .method.merging import whereabouts
from .method.objective import objective
from .method.plugin import Plugin
from .method.selector import Selector, gazes_of
from .method.token_stream import TokenStream
from .pretrained import Pretrained


class SpotlighterWrapper(Pretrained, nn.Module):
    """A host that classifies with the k tokens that matter.

    ``wrapper(images)`` gives logits (B, C). ``wrapper(images, labels)`` gives a dictionary: ``loss`` (Eq. 15), its
    unweighted parts by name, and ``logits``. The host's model is hooked, not changed: called directly it behaves as
    before, and ``detach`` removes the hooks. Calls in several threads do not meet.

    Args:
        host_model: a model that an adapter knows.
        config: hyper-parameters; the default preset if None.
        adapter: an adapter of the caller's own; otherwise ``hosts.adapter_for`` finds one.
        class_names: names of the host's C classes in order.
        check: whether to see, on one random batch, that with every token kept the host's logits stay what they are.

    Raises:
        ValueError: an option does not suit the tower, the tower has no tokens, no adapter knows the host, the names are
            not as many as the host's classes, or the check fails.
    """

    _is_replica = False  # DataParallel sets it on its replicas

    def __init__(self, host_model, config: SpotlighterConfig | None = None, adapter=None, class_names=None, check=True):
        super().__init__()
        self.config = config = config or SpotlighterConfig()
        class_names = listed(class_names)
        self.adapter = adapter or adapter_for(host_model, class_names)
        self.class_names = class_names or list(self.adapter.class_names)
        n_classes = getattr(self.adapter, "n_classes", len(self.class_names))
        if len(self.class_names) != n_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names and the host {n_classes} classes")
        if config.idle():
            warnings.warn(f"{', '.join(config.idle())}: nothing reads it beside the other options", stacklevel=2)
        if self.adapter.gives_logits and config.mapping != "none":
            raise ValueError(
                f"TRAINER.SPOTLIGHTER.MAPPING = {config.mapping!r}: {type(host_model).__name__} keeps its own logits, "
                "which a mapping would replace; take PRESET default"
            )
        layout = self.adapter.layout
        self.steps = config.steps(layout.tower(self.adapter.dim))
        self.host = host_model
        merges = any(step.merges for step in self.steps)
        self.stream = TokenStream(layout, *(step.block for step in self.steps), weighs=merges)
        self.plugin = Plugin(config, self.class_names, layout.width, self.adapter.dim, layout.heads)
        self.plugin.to(layout.device).train(host_model.training)
        self.invariance: float | None = None
        """By how much the host's logits changed, relative to their scale, when every token was kept; if checked."""
        if check:
            try:
                self.invariance = check_invariance(self.stream, self.adapter, [step.left for step in self.steps])
            except ValueError:
                self.detach()
                raise
        self._trail = []
        self.unreached: set[str] = set()
        """Names of losses that reached no trainable parameter in the latest call with labels and were left out."""

    def detach(self) -> nn.Module:
        """Remove every hook and return the host's model; the wrapper is of no use afterwards."""
        self.stream.detach()
        return self.host

    @property
    def kept(self) -> Tensor | None:
        """Patches (B, k) in 0…N-1 of the tokens that the latest call kept, best first; None before any call."""
        return None if not self._trail else self._whereabouts()[0]

    @property
    def token_of_patch(self) -> Tensor | None:
        """For each patch which of the tokens that the latest call kept it is part of, (B, N) in 0…k-1, or -1."""
        return None if not self._trail else self._whereabouts()[1]

    def _whereabouts(self):
        return whereabouts(self._trail, self.stream.n_tokens, self.stream.layout.n_lead)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the plug-in trains, beside the host's own parameters."""
        return list(self.plugin.parameters())

    def extra_parameter_count(self) -> int:
        """How many trainable parameters the plug-in adds."""
        return sum(parameter.numel() for parameter in self.trainable_parameters())

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """The plug-in's state alone: mapping, bank and memory with class names. The host's is ``host.state_dict()``."""
        return self.plugin.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False) -> Any:
        return self.plugin.load_state_dict(state_dict, strict, assign)

    def prepare(self) -> None:
        """Encode texts and fold weights now, not in the first batch: before ``torch.compile``, in evaluation mode."""
        self._begin(self._adapter(), torch.empty(0, device=self.adapter.layout.device))[1].recollection()

    def refresh(self) -> None:
        """Forget kept texts; needed only where they change by other means than the host's parameters."""
        self.plugin.forget_constants()

    def forward(
        self, images: Tensor, labels: Tensor | None = None, extras: dict | None = None
    ) -> Tensor | dict[str, Tensor]:
        adapter = self._adapter()
        if labels is not None and adapter.gives_logits:
            raise ValueError(
                f"{type(self.host).__name__} is trained by its own step: train it without the wrapper, then remember"
            )
        raw_text, batch = self._begin(adapter, images, labels)
        image = self._encode(adapter, batch)  # (B, d)
        with torch.autocast(images.device.type, enabled=False):
            logits = batch.logits(image, batch.tokens)  # argmax_c of these is Eq. 16
            if labels is None:
                return logits
            extras = {"images": images, "text": raw_text, **(extras or {})}
            parts = objective(batch, adapter, image, logits, labels, extras)
        reached = {name for name, value in parts.items() if value.requires_grad}
        self.unreached = {"cls", *batch.wants} - reached
        parts = {name: value for name, value in parts.items() if name in reached or name == "cls"}
        return {"loss": losses.total_loss(parts, *self.config.lambdas), **parts, "logits": logits}

    @torch.no_grad()
    def image_embeddings(self, images: Tensor) -> Tensor:
        """v of images (B, 3, h, w) as classified without labels: (B, d), unit length."""
        adapter = self._adapter()
        return F.normalize(self._encode(adapter, self._begin(adapter, images)[1]), dim=-1)

    @torch.inference_mode(False)
    @torch.no_grad()
    def remember(self, batches) -> int:
        """Learn from the training images what the classes look like, as the trained model sees them, and weigh it by
        classes and shots left out, in place of what was there. ``plugin.memory.choice`` says what came of it.

        Args:
            batches: pairs of images (B, 3, h, w) and the classes (B,) to file them under; of a class the first
                ``match_shots`` are taken.

        Returns:
            The number of images learned from; 0 without a memory.
        """
        memory, limit, adapter = self.plugin.memory, self.config.match_shots, self._adapter()
        if memory is None:
            return 0
        device = memory.centre.device
        seen = torch.zeros(len(self.class_names), dtype=torch.long, device=device)
        embeddings, rows, own = [], [], []
        with self._evaluating():
            for images, labels in batches:
                images, labels = images.to(device), labels.to(device)
                new = place_in_class(labels) + seen[labels] < limit
                if new.any():
                    batch = self._begin(adapter, images[new])[1]
                    embeddings.append(F.normalize(self._encode(adapter, batch), dim=-1))
                    rows.append(labels[new])
                    if adapter.gives_logits:
                        own.append(to_weigh_by(batch.own_logits.float(), labels[new]))
                    seen += labels[new].bincount(minlength=len(seen))
            rows = ranks.gather(torch.cat([seen[:0], *rows]))
            embeddings = ranks.gather(torch.cat([memory.centre.new_zeros(0, len(memory.centre)), *embeddings]))
            first = place_in_class(rows) < limit  # of all processes' images
            if adapter.gives_logits:
                none = to_weigh_by(embeddings.new_zeros(0, len(seen)), seen[:0])
                weighed = torch.isin(rows, weighed_classes(len(seen)).to(device))
                own = ranks.gather(torch.cat([none, *own]))[first[weighed]]
            if len(rows):
                self.learn(embeddings[first], rows[first], own if adapter.gives_logits else None)
        return int(first.sum())

    @torch.inference_mode(False)
    @torch.no_grad()
    def learn(self, embeddings: Tensor, labels: Tensor, own: Tensor | None = None) -> None:
        """``remember`` images of which ``image_embeddings`` are known: (n, d), and the classes (n,) to file them under.

        own: ``memory.to_weigh_by`` of the host's logits (n, C) of these images, where the host keeps its own.
        """
        adapter = self._adapter()
        batch = self._begin(adapter, embeddings)[1]
        texts = batch.text, adapter.templates(), batch.scale.item()
        self.plugin.memory.remember(embeddings, labels, *texts, own, not adapter.guesses_labels)
        self.refresh()

    def classify(self, embeddings: Tensor) -> Tensor:
        """Logits (B, C) of images of which ``image_embeddings`` are known, (B, d).

        Raises:
            ValueError: a mapping reads an image's tokens, or the host keeps its own logits: an embedding has neither.
        """
        adapter = self._adapter()
        if self.plugin.mapping.trm is not None or adapter.gives_logits:
            raise ValueError("classify: the logits of this model need images, embeddings say too little")
        return self._begin(adapter, embeddings)[1].logits(embeddings, None)

    @contextmanager
    def _evaluating(self):
        """Evaluation mode for a while, and what is training afterwards trains as before.

        Without .eval(), which some layers (LoRA) take as an occasion to change weights.
        """
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        if training:
            self.refresh()
        try:
            yield
        finally:
            for module in training:
                module.training = True
            if training:
                self.refresh()

    def _adapter(self) -> HostAdapter:
        """The adapter; a replica of DataParallel has one that looks at its own host."""
        adapter = self.adapter
        if self._is_replica:
            adapter = copy(adapter)
            adapter.model = self.host
        return adapter

    def _begin(self, adapter, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Selector]:
        """The texts' raw embeddings (C, d), and a batch that is about to enter the tower."""
        plugin, memory = self.plugin, self.plugin.memory
        fresh = plugin.training or (labels is not None and torch.is_grad_enabled()) or self._is_replica

        def constant(name, make, reads_host=True):
            if fresh and (reads_host or self._is_replica):
                return make()
            return plugin.constant(name, make, images.device, self.host if reads_host else None)

        def texts():
            raw = adapter.encode_text()
            return raw, F.normalize(raw.float(), dim=-1)

        raw_text, text = constant("texts", texts, adapter.train_text)  # (C, d) both
        scale = adapter.logit_scale.float()
        gazes = constant("gazes", lambda: gazes_of(adapter.layout, self.steps))
        parts = adapter.layout, adapter.project, constant, self.steps, gazes
        batch = Selector(self.config, plugin, *parts, images, text, scale)
        batch.bias = adapter.logit_bias
        batch.recalls = memory is not None and memory.is_ready
        batch.templates = adapter.templates
        if labels is not None:
            batch.wants = frozenset(name for name in self.config.losses if self.config.weight_of(name) > 0)
            batch.gather, batch.mean = ranks.gather, ranks.mean
            classes = adapter.assignment_labels(images, labels)  # (B,)
            batch.rows = classes if plugin.bank is None else plugin.bank.rows[classes]
            batch.recalls = batch.recalls and not plugin.training  # the memory has seen these very images
        return raw_text, batch

    def _encode(self, adapter, batch: Selector) -> Tensor:
        """One pass through the tower: v before normalization, (B, d)."""
        with self.stream.selecting(*batch.choices(), layout=batch.layout) as tower:
            tower.goes_back = "kl_visual" in batch.wants
            image, batch.own_logits = adapter.classify(batch.images)
            image = batch.image(image, tower)
        if not torch.compiler.is_compiling():  # for readers alone
            self._trail = batch.trail
        return image
