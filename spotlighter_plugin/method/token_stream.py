"""Where the vision tower is hooked: the sequence that enters a block comes in, the one that goes on goes out.

A ``TokenStream`` says where, and knows nothing of any batch; a ``Pass`` is one batch on its way through the tower.
"""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import Layout, layout_of

_THREAD = threading.local()  # .passes: those under way in this thread, so that calls in several threads never meet


class TokenStream:
    """Forward hooks on a vision transformer's blocks; the host's code and modules stay as they are.

    Inside ``selecting(…, choose)`` the tower hands the sequence that enters block s to ``choose`` and goes on with what
    ``choose`` returns. Earlier blocks before which tokens are replaced have a choice each, in front of ``choose``.
    Outside ``selecting``, and in every other thread, the tower is the host's own, bit for bit.

    Args:
        layout: where the tower has its parts, or a tower whose layout is known.
        blocks: indices in [0, L), ascending, of the blocks before which tokens are replaced; the last one is s.
        weighs: whether tokens may come to stand for several (``Pass.sizes``), which attention has to be told.

    Raises:
        ValueError: attention has to be told, and a block's takes no mask.
    """

    def __init__(self, layout: Layout | nn.Module, *blocks: int, weighs: bool = False):
        self.layout = layout if isinstance(layout, Layout) else layout_of(layout)
        self.blocks, self.n_tokens = blocks, self.layout.n_tokens
        modules = self.layout.blocks
        hooks = [(modules[i], partial(self._before, i)) for i in range(blocks[0], len(modules))]
        self._handles = [
            *(module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks),
            modules[-1].register_forward_hook(self._after),
        ]
        if weighs:
            attentions = [attention.module for attention in self.layout.attentions[blocks[0] :]]
            hooks = [(module, partial(self._weigh, _mask_name(module))) for module in attentions]
            self._handles += [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
        self.is_attached = True

    @property
    def vision(self) -> nn.Module:
        return self.layout.vision

    @property
    def block(self) -> nn.Module:
        """Block s."""
        return self.layout.blocks[self.blocks[-1]]

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.is_attached = [], False

    @contextmanager
    def selecting(self, *choices, layout: Layout | None = None) -> Iterator["Pass"]:
        """Let ``choice(tower: Pass, hidden (1+n+M, B, w)) -> (S, B, w)``, one per block, replace what enters it.

        Args:
            layout: of the hooked tower, or of a replica of it.

        Raises:
            RuntimeError: the hooks have been removed.
        """
        if not self.is_attached:
            raise RuntimeError("this wrapper was detached from its host: make a new SpotlighterWrapper around the host")
        outer = getattr(_THREAD, "passes", ())
        tower = Pass(self, choices, layout or self.layout)
        _THREAD.passes = (*outer, tower)
        try:
            yield tower
        finally:
            _THREAD.passes = outer

    def _under_way(self):
        passes = getattr(_THREAD, "passes", ())
        return next((each for each in passes if each.stream is self and not each.is_choosing), None)

    def _before(self, index, module, args, kwargs):
        tower = self._under_way()
        return None if tower is None else tower.enter(index, args, kwargs)

    def _weigh(self, name, module, args, kwargs):
        tower = next((each for each in getattr(_THREAD, "passes", ())[::-1] if each.stream is self), None)
        if tower is None or tower.bias is None:
            return None
        query = args[0] if args else next(iter(kwargs.values()))
        bias, mask = tower.bias_for(query).to(query.dtype), kwargs.get(name)
        bias = bias if name == "key_padding_mask" else bias[:, None, None]  # (B, S) or (B, 1, 1, S)
        return args, kwargs | {name: bias if mask is None else mask + bias}

    def _after(self, module, args, output):
        tower = self._under_way()
        if tower is not None:
            tower.leave(output)


class Pass:
    """One batch on its way through the tower, while ``TokenStream.selecting`` lasts.

    Choices see sequences as (S, B, w): CLS if there is one, patch tokens, host prompts, whatever order the tower has
    them in. While the last choice runs it may call ``tail`` to run blocks s…L-1 on further sequences: prompts that the
    host injects into these blocks act there too, because the same modules are called with the same inputs.

    Attributes:
        block, index: the block before which the present choice is made, and its number.
        n_now: how many positions behind CLS are, or stand for, patch tokens where the present choice is made.
        n_prompts: M, the host's prompts there.
        sizes: for how many tokens of the image each position of the sequence stands, (B, S) float32, set by a choice
            for the sequence that it returns; None where each stands for itself.
        bias: what attention adds to its logits, so that one that stands for n counts as n.
        output: what the last block gave, (S, B, w); None before.
    """

    def __init__(self, stream: TokenStream, choices: tuple, layout: Layout):
        self.stream, self.layout = stream, layout
        self.choices = dict(zip(stream.blocks, choices, strict=True))
        self.index, self.block = stream.blocks[0], layout.blocks[stream.blocks[0]]
        self.n_now, self.n_prompts = stream.n_tokens, 0
        self.sizes: Tensor | None = None
        self.bias: Tensor | None = None
        self.output: Tensor | None = None
        self.is_choosing = False
        self.goes_back = True  # whether ``whole`` may be asked for; until then the first sequence is held
        self._came = {}  # what each block before which tokens were replaced was called with

    def enter(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments with which a block goes on."""
        if index not in self.choices:
            return self._shortened(args[0], args[1:], kwargs)
        hidden = self._lengthwise(args[0])
        self.index, self.block = index, self.layout.blocks[index]
        self.n_prompts = len(hidden) - self.layout.n_lead - self.n_now
        hidden = self._turned(hidden, self.n_prompts)
        if self.sizes is not None:  # prompts that a block has put in since then
            self.sizes = F.pad(self.sizes, (0, len(hidden) - self.sizes.shape[1]), value=1.0)
        if index == self.stream.blocks[-1] or (index == self.stream.blocks[0] and self.goes_back):
            self._came[index] = args, kwargs
        self.is_choosing = True
        try:
            hidden = self.choices[index](self, hidden)
        finally:
            self.is_choosing = False
        self.n_now, self.bias = len(hidden) - self.layout.n_lead - self.n_prompts, self._bias_of(self.sizes)
        return self._shortened(with_hidden(args[0], self._turned_back(hidden)), args[1:], kwargs)

    def bias_for(self, query: Tensor) -> Tensor:
        """``bias`` of a sequence into which the block itself has put further prompts of the host's: (B, S)."""
        bias, lead = self.bias, self.layout.n_lead
        further = query.shape[self.layout.batch_first] - bias.shape[1]
        if not further:
            return bias
        place = lead if self.layout.prompts_first else bias.shape[1]
        return torch.cat([bias[:, :place], bias.new_zeros(len(bias), further), bias[:, place:]], dim=1)

    def leave(self, output) -> None:
        """Note what the last block gave."""
        hidden = self._lengthwise(output)
        self.output = self._turned(hidden, len(hidden) - self.layout.n_lead - self.n_now)

    def tail(self, hidden: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run blocks s…L-1 and the readout on another sequence; to be called by the last choice only.

        Args:
            hidden: (S, B, w), the sequence that enters block s: CLS first, host prompts last.
            sizes: (B, S), as ``self.sizes``.

        Returns:
            The image embedding (B, d), not normalized, and the last block's output (S, B, w).
        """
        return self._run(self.stream.blocks[-1], self._turned_back(hidden), sizes)

    def whole(self) -> Tensor:
        """The image embedding (B, d) as the tower gives it without any selection; for the last choice only."""
        first = self.stream.blocks[0]
        return self._run(first, hidden_of(self._came[first][0][0]))[0]

    def patches(self, hidden: Tensor) -> Tensor:
        """What is, or stands for, patch tokens in the sequence that came in: (1+n+M, B, w) → (n, B, w)."""
        return hidden[self.layout.n_lead : self.layout.n_lead + self.n_now]

    def tokens(self, hidden: Tensor, kept: Tensor) -> Tensor:
        """Patch tokens ``kept`` (B, k), indices in 0…n-1, of the sequence (1+n+M, B, w) that came in: (k, B, w)."""
        index = kept.T.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])  # (k, B, w)
        return self.patches(hidden).gather(0, index)

    def sequence(
        self, hidden: Tensor, tokens: Tensor, extra: Tensor | None = None, fused: Tensor | None = None
    ) -> Tensor:
        """[CLS, extra, tokens, fused, host prompts] from the sequence (1+n+M, B, w) that came in.

        tokens: (k, B, w); extra: (E, B, w) or None; fused: (1, B, w) or None.
        """
        lead = self.layout.n_lead
        parts = hidden[:lead], extra, tokens, fused, hidden[lead + self.n_now :]
        return torch.cat([part for part in parts if part is not None])

    def _run(self, first, hidden, sizes=None):
        (args, kwargs), before, self.bias = self._came[first], self.bias, self._bias_of(sizes)
        stream = with_hidden(args[0], hidden)
        rest = len(self._lengthwise(stream)) - self.n_prompts
        for block in self.layout.blocks[first:]:
            args, kwargs = self._shortened(stream, args[1:], kwargs)
            stream = block(*args, **kwargs)
            if isinstance(args[0], Tensor):  # what goes in as a tensor and comes out beside others goes on alone
                stream = hidden_of(stream)
        self.bias = before
        output = self._lengthwise(stream)
        output = self._turned(output, len(output) - rest)
        return self.layout.image(output), output

    def _lengthwise(self, stream) -> Tensor:
        hidden = hidden_of(stream)
        return hidden.transpose(0, 1) if self.layout.batch_first else hidden

    def _turned(self, hidden: Tensor, prompts: int) -> Tensor:
        """From the tower's order to that with its prompts last."""
        lead = self.layout.n_lead
        if not self.layout.prompts_first or not prompts:
            return hidden
        return torch.cat([hidden[:lead], hidden[lead + prompts :], hidden[lead : lead + prompts]])

    def _order_back(self, hidden: Tensor) -> Tensor:
        lead, rest = self.layout.n_lead, len(hidden) - self.n_prompts
        if self.layout.prompts_first and self.n_prompts:
            hidden = torch.cat([hidden[:lead], hidden[rest:], hidden[lead:rest]])
        return hidden

    def _turned_back(self, hidden: Tensor) -> Tensor:
        hidden = self._order_back(hidden)
        return hidden.transpose(0, 1).contiguous() if self.layout.batch_first else hidden

    def _bias_of(self, sizes):
        """(B, S) in the tower's own order."""
        return None if sizes is None else self._order_back(sizes.T).T.log()

    def _shortened(self, stream, args, kwargs):
        """A block's arguments with every mask in them cut to the positions that its sequence still has."""
        if not args and not kwargs:
            return (stream,), kwargs
        length = len(self._lengthwise(stream))
        full = self.layout.n_lead + self.stream.n_tokens + self.n_prompts
        cut = partial(self._cut_mask, length=length, full=full)
        return (stream, *map(cut, args)), {name: cut(value) for name, value in kwargs.items()}

    def _cut_mask(self, mask, length, full):
        if not isinstance(mask, Tensor) or mask.shape[-2:] != (full, full):
            return mask
        lead = self.layout.n_lead + (self.n_prompts if self.layout.prompts_first else 0)
        patches = slice(lead, lead + self.stream.n_tokens)
        if not (_alike(mask[..., patches, :], -2) and _alike(mask[..., patches], -1)):
            raise ValueError(
                "the tower's blocks take a mask that tells patch tokens apart, so that none can be left out"
            )
        places = torch.arange(full, device=mask.device)
        n = length - full + self.stream.n_tokens  # what stands for patch tokens now
        places = torch.cat([places[:lead], places[lead : lead + 1].expand(n), places[lead + self.stream.n_tokens :]])
        return mask[..., places, :][..., places]


def _mask_name(attention: nn.Module) -> str:
    """The argument in which an attention takes what it adds to its logits."""
    known = inspect.signature(attention.forward).parameters
    for name in ("key_padding_mask", "attention_mask", "attn_mask"):
        if name in known:
            return name
    raise ValueError(
        f"a {type(attention).__name__} takes no mask that could say for how many tokens one stands: "
        "set MERGE 0 and SHARE 0"
    )


def _alike(mask: Tensor, dim: int) -> bool:
    return torch.equal(mask, mask.narrow(dim, 0, 1).expand_as(mask))


def hidden_of(stream) -> Tensor:
    """The hidden states of what blocks pass on: a tensor, or (MaPLe) a list whose element 0 is one."""
    return stream[0] if isinstance(stream, (list, tuple)) else stream


def with_hidden(stream, hidden: Tensor) -> Tensor | list:
    """What blocks pass on, with other hidden states."""
    return [hidden, *stream[1:]] if isinstance(stream, (list, tuple)) else hidden
