"""Learned prompts that travel through CLIP's blocks, put there by forward pre-hooks on OpenAI's unmodified modules.

Every host with prompts inside a tower (MaPLe, PromptSRC, PromptKD's student) injects them here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from clip.model import Transformer, VisionTransformer
from torch import nn


class DeepPrompts:
    """Prompts of one tower. Block i's prompts replace what block i-1 made of its own.

    prompt_of: gives the prompts of block i, (n, w); n_ctx: their number n.
    The hooks look at the two ends of the sequence only, so what is between may be of any length.
    """

    def __init__(self, prompt_of: Callable[[int], torch.Tensor], n_ctx: int):
        self.prompt_of, self.n_ctx, self.enabled = prompt_of, n_ctx, True

    def into_vision(self, visual: VisionTransformer, depth: int) -> DeepPrompts:
        """Carry prompts in blocks 0…depth-1 at the end of the sequence, behind CLS and the patches."""
        if depth:
            visual.ln_pre.register_forward_pre_hook(self._append)
        for i, block in list(enumerate(visual.transformer.resblocks))[1:depth]:
            block.register_forward_pre_hook(partial(self._replace_last, i))
        return self

    def into_text(self, transformer: Transformer, depth: int) -> DeepPrompts:
        """Carry prompts in blocks 1…depth-1 behind the start token, where block 0 has the learned context."""
        for i, block in list(enumerate(transformer.resblocks))[1:depth]:
            block.register_forward_pre_hook(partial(self._replace_after_start, i))
        return self

    @contextmanager
    def off(self) -> Iterator[None]:
        """The tower as it was before prompts."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def _append(self, module, args):
        if not self.enabled:
            return None
        x = args[0]  # (B, 1+N, w)
        prompts = self.prompt_of(0).type(x.dtype).expand(len(x), -1, -1)  # (B, n, w)
        return (torch.cat([x, prompts], dim=1), *args[1:])  # (B, 1+N+n, w)

    def _replace_last(self, i, module, args):
        if not self.enabled:
            return None
        x = args[0]  # (S, B, w)
        return (torch.cat([x[: -self.n_ctx], self._of_block(i, x)]), *args[1:])

    def _replace_after_start(self, i, module, args):
        if not self.enabled:
            return None
        x = args[0]  # (T, C, w)
        return (torch.cat([x[:1], self._of_block(i, x), x[1 + self.n_ctx :]]), *args[1:])

    def _of_block(self, i, x):
        return self.prompt_of(i).type(x.dtype)[:, None].expand(-1, x.shape[1], -1)  # (n, B, w)


def checked_depth(depth: int, blocks: int, option: str, least: int = 1) -> int:
    """A prompt depth that the tower has room for: larger ones are cut with a note; ValueError below `least`."""
    if depth < least:
        raise ValueError(f"{option} {depth} is below {least}: raise it")
    if depth > blocks:
        print(f"{option} {depth} exceeds the tower's {blocks} blocks: {blocks} are used")
    return min(depth, blocks)


def own_vision_prompts(visual: VisionTransformer, n_ctx: int, depth: int) -> DeepPrompts:
    """Give the image tower trained prompts of its own: a parameter VPT and, from block 1 on, VPT_shallow in each."""
    if depth:
        _own(visual, "VPT", n_ctx, visual.transformer.width)
    _own_in_blocks(visual.transformer, n_ctx, depth)
    blocks = visual.transformer.resblocks
    source = _OwnPrompts(visual, blocks)
    return DeepPrompts(source, n_ctx).into_vision(visual, depth)


def own_text_prompts(transformer: Transformer, n_ctx: int, depth: int) -> DeepPrompts:
    """Give the text tower trained prompts of its own: each block's VPT_shallow from block 1 on."""
    _own_in_blocks(transformer, n_ctx, depth)
    return DeepPrompts(_OwnPrompts(None, transformer.resblocks), n_ctx).into_text(transformer, depth)


class _OwnPrompts:
    def __init__(self, first, blocks):
        self.first, self.blocks = first, blocks

    def __call__(self, i):
        return self.first.VPT if i == 0 else self.blocks[i].VPT_shallow


def _own_in_blocks(transformer, n_ctx, depth):
    for block in list(transformer.resblocks)[1:depth]:
        _own(block, "VPT_shallow", n_ctx, transformer.width)


def _own(module, name, n_ctx, width):
    like = next(module.parameters())
    module.register_parameter(name, nn.Parameter(torch.randn(n_ctx, width, device=like.device) * 0.02))
