"""Where the vision tower is hooked: tokens are replaced before some blocks, and blocks after them can be run again."""

from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


class TokenStream:
    """Forward hooks on a CLIP vision transformer; the host's code and modules stay as they are.

    Inside ``selecting(…, choose)`` the tower hands the sequence that enters block s to ``choose`` and goes on with what
    ``choose`` returns. While ``choose`` runs it may call ``tail`` to run blocks s…L-1 on further sequences: prompts
    that the host injects into these blocks act there too, because the same modules are called with the same inputs.
    Earlier blocks before which tokens are replaced have a choice each, in front of ``choose``.
    Outside ``selecting`` the tower is the host's own, bit for bit.

    Args:
        vision: module with ``conv1, positional_embedding, transformer.resblocks, ln_post, proj`` (OpenAI's layout).
        blocks: indices in [0, L), ascending, of the blocks before which tokens are replaced; the last one is s.
    """

    def __init__(self, vision: nn.Module, *blocks: int):
        self.vision = vision
        self.stages = [list(vision.transformer.resblocks)[block:] for block in blocks]
        self.tail_blocks = self.stages[-1]
        self.block = self.tail_blocks[0]
        self.n_tokens = self.n_now = vision.positional_embedding.shape[0] - 1
        """N, and how many positions behind CLS are, or stand for, patch tokens where the latest choice was made."""
        self.head_scale: Tensor | None = None  # (H,), multiplies each head's output in block s
        self.output: Tensor | None = None  # (1+…, B, w), what the transformer gave in the latest selected run
        self._choices = ()
        self._args = []  # arguments of the blocks before which the present pass has replaced tokens
        self._is_choosing = False
        attention = self.block.attn
        self._handles = [
            *(tail[0].register_forward_pre_hook(partial(self._before, i)) for i, tail in enumerate(self.stages)),
            vision.transformer.register_forward_hook(self._after_transformer),
            attention.register_forward_pre_hook(self._scale_heads),
            attention.register_forward_hook(self._restore_heads, always_call=True),
        ]
        self._unscaled_weight = None

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def selecting(self, *choices):
        """Let ``choice(hidden (1+n+M, B, w)) -> (S, B, w)``, one per block, replace the sequence that enters it."""
        self._choices = choices
        try:
            yield self
        finally:
            self._choices, self._args, self.head_scale, self.output = (), [], None, None

    def tail(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Run blocks s…L-1 and the readout on another sequence; to be called by the last choice only.

        Args:
            hidden: (S, B, w), the sequence that enters block s: CLS first, host prompts last.

        Returns:
            The image embedding (B, d), not normalized, and the transformer's output (S, B, w).
        """
        return self._run(_with_hidden(self._args[-1][0], hidden), self.tail_blocks)

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

    def _before(self, stage, module, args):
        if not self._choices or self._is_choosing:  # not ours to touch, or run again by a choice
            return None
        hidden = _hidden_of(args[0])
        self._args = [*self._args[:stage], args]
        n_prompts = len(_hidden_of(self._args[0][0])) - 1 - self.n_tokens
        self.n_now = len(hidden) - 1 - n_prompts
        self._is_choosing = True
        try:
            hidden = self._choices[stage](hidden)
        finally:
            self._is_choosing = False
        return (_with_hidden(args[0], hidden), *args[1:])

    def _after_transformer(self, module, args, output):
        if self._choices:
            self.output = _hidden_of(output)

    # A head's output o_h enters the block's output as W_h o_h, so scaling W's columns scales the head. The scaled
    # weight stands in for the parameter during the call alone.
    def _scale_heads(self, module, args):
        if self.head_scale is None:
            return
        weight = module.out_proj.weight  # (w, w)
        columns = self.head_scale.repeat_interleave(weight.shape[1] // module.num_heads)  # (w,)
        self._unscaled_weight = weight
        module.out_proj._parameters["weight"] = (weight * columns).to(weight.dtype)

    def _restore_heads(self, module, args, output):
        if self._unscaled_weight is not None:
            module.out_proj._parameters["weight"] = self._unscaled_weight
            self._unscaled_weight = None


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
