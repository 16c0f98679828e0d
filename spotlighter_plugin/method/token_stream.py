"""Where the vision tower is hooked: the sequence that enters a block comes in, the one that goes on goes out.

A ``TokenStream`` says where, and knows nothing of any batch; a ``Pass`` is one batch on its way through the tower.
"""

import threading
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

_THREAD = threading.local()  # .passes: those under way in this thread, so that calls in several threads never meet


class TokenStream:
    """Forward hooks on a CLIP vision transformer; the host's code and modules stay as they are.

    Inside ``selecting(…, choose)`` the tower hands the sequence that enters block s to ``choose`` and goes on with what
    ``choose`` returns. Earlier blocks before which tokens are replaced have a choice each, in front of ``choose``.
    Outside ``selecting``, and in every other thread, the tower is the host's own, bit for bit.

    Args:
        vision: module with ``conv1, positional_embedding, transformer.resblocks, ln_post, proj`` (OpenAI's layout).
        blocks: indices in [0, L), ascending, of the blocks before which tokens are replaced; the last one is s.
    """

    def __init__(self, vision: nn.Module, *blocks: int):
        self.vision, self.blocks = vision, blocks
        self.n_tokens = vision.positional_embedding.shape[0] - 1
        self.stages = self.stages_of(vision)
        self.block = self.stages[-1][0]
        self._handles = [
            *(tail[0].register_forward_pre_hook(partial(self._before, i)) for i, tail in enumerate(self.stages)),
            vision.transformer.register_forward_hook(self._after_transformer),
        ]
        self.is_attached = True

    def stages_of(self, vision: nn.Module) -> list[list[nn.Module]]:
        """For each block before which tokens are replaced, it and all after it."""
        return [list(vision.transformer.resblocks)[block:] for block in self.blocks]

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.is_attached = [], False

    @contextmanager
    def selecting(self, *choices, vision: nn.Module | None = None):
        """Let ``choice(tower: Pass, hidden (1+n+M, B, w)) -> (S, B, w)``, one per block, replace what enters it.

        Args:
            vision: the hooked tower, or a replica of it.

        Raises:
            RuntimeError: the hooks have been removed.
        """
        if not self.is_attached:
            raise RuntimeError("this wrapper was detached from its host: make a new SpotlighterWrapper around the host")
        outer = getattr(_THREAD, "passes", ())
        tower = Pass(self, choices, vision or self.vision)
        _THREAD.passes = (*outer, tower)
        try:
            yield tower
        finally:
            _THREAD.passes = outer

    def _under_way(self):
        passes = getattr(_THREAD, "passes", ())
        return next((each for each in passes if each.stream is self and not each.is_choosing), None)

    def _before(self, stage, module, args):
        tower = self._under_way()
        return None if tower is None else tower.replace(stage, args)

    def _after_transformer(self, module, args, output):
        tower = self._under_way()
        if tower is not None:
            tower.output = _hidden_of(output)


class Pass:
    """One batch on its way through the tower, while ``TokenStream.selecting`` lasts.

    While the last choice runs it may call ``tail`` to run blocks s…L-1 on further sequences: prompts that the host
    injects into these blocks act there too, because the same modules are called with the same inputs.

    Attributes:
        block: the block before which the present choice is made.
        n_now: how many positions behind CLS are, or stand for, patch tokens where the present choice is made.
        output: what the transformer gave, (S, B, w); None before.
    """

    def __init__(self, stream: TokenStream, choices: tuple, vision: nn.Module):
        self.stream, self.choices, self.vision = stream, choices, vision
        self.stages = stream.stages_of(vision)
        self.block = self.stages[0][0]
        self.n_now = stream.n_tokens
        self.output: Tensor | None = None
        self.is_choosing = False
        self._args = []  # arguments of the blocks before which tokens have been replaced

    def replace(self, stage: int, args: tuple) -> tuple:
        """The arguments with which a stage's block goes on."""
        hidden = _hidden_of(args[0])
        self._args = [*self._args[:stage], args]
        n_prompts = len(_hidden_of(self._args[0][0])) - 1 - self.stream.n_tokens
        self.n_now, self.block = len(hidden) - 1 - n_prompts, self.stages[stage][0]
        self.is_choosing = True
        try:
            hidden = self.choices[stage](self, hidden)
        finally:
            self.is_choosing = False
        return (_with_hidden(args[0], hidden), *args[1:])

    def tail(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Run blocks s…L-1 and the readout on another sequence; to be called by the last choice only.

        Args:
            hidden: (S, B, w), the sequence that enters block s: CLS first, host prompts last.

        Returns:
            The image embedding (B, d), not normalized, and the transformer's output (S, B, w).
        """
        return self._run(_with_hidden(self._args[-1][0], hidden), self.stages[-1])

    def whole(self) -> Tensor:
        """The image embedding (B, d) as the tower gives it without any selection; for the last choice only."""
        return self._run(self._args[0][0], self.stages[0])[0]

    def tokens(self, hidden: Tensor, kept: Tensor) -> Tensor:
        """Patch tokens ``kept`` (B, k), indices in 0…n-1, of the sequence (1+n+M, B, w) that came in: (k, B, w)."""
        index = kept.T.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])  # (k, B, w)
        return hidden[1 : 1 + self.n_now].gather(0, index)

    def sequence(self, hidden: Tensor, tokens: Tensor, extra: Tensor | None = None) -> Tensor:
        """[CLS, extra, tokens, host prompts] from the sequence (1+n+M, B, w) that came in: (1+E+k+M, B, w).

        tokens: (k, B, w); extra: (E, B, w) or None.
        """
        parts = [hidden[:1], tokens, hidden[1 + self.n_now :]]
        if extra is not None:
            parts.insert(1, extra)
        return torch.cat(parts)

    def _run(self, stream, blocks):
        for block in blocks:
            stream = block(stream)
        output = _hidden_of(stream)  # (S, B, w)
        return self.vision.ln_post(output[0]) @ self.vision.proj, output


def check_tower(vision: nn.Module) -> None:
    """Raises ValueError, one line, when ``vision`` is not a CLIP vision transformer whose tokens can be selected."""
    if not hasattr(vision, "transformer") or not hasattr(vision, "positional_embedding"):
        raise ValueError(
            f"the image encoder is a {type(vision).__name__}, not a vision transformer, and has no tokens to select; "
            "choose a ViT backbone, for example MODEL.BACKBONE.NAME ViT-B/16"
        )


def _hidden_of(stream) -> Tensor:
    """The hidden states of what blocks pass on: a tensor, or (MaPLe) a list whose element 0 is one."""
    return stream[0] if isinstance(stream, (list, tuple)) else stream


def _with_hidden(stream, hidden: Tensor):
    return [hidden, *stream[1:]] if isinstance(stream, (list, tuple)) else hidden
