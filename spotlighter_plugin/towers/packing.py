"""Texts that begin alike: a causal tower encodes their common beginning once for several of them.

CoOp's prompts share their start and their context; behind it a class has four or five tokens of its own. Several
classes' own tokens stand behind one beginning in one sequence, and a mask lets each see the beginning and its own class
alone. The tower's blocks run as they are, so hooks on them, and prompts that they put into the beginning, act as ever.
What is packed costs a little more attention, and no copy of a block's code.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def common_prefix(tokenized: Tensor) -> int:
    """How many leading ids all texts (C, T) have in common, the end of the shortest text left out."""
    same = (tokenized == tokenized[:1]).all(0).long().cumprod(0).sum()
    return min(int(same), int(tokenized.argmax(-1).min()))


class Packing:
    """Where C texts stand in n sequences of T positions: the beginning, then slots, one text of the n in each.

    Texts of like length share a slot's number, so that little is padded.

    Args:
        tokenized: (C, 77) ids, whose largest id marks the end of a text.
        shared: P, how many leading positions are one and the same for all; prompts that the tower's blocks put there
            lie within them. Up to 1, each text has a sequence of its own.
        width: w of the tower, which decides how many texts a beginning pays for.
    """

    def __init__(self, tokenized: Tensor, shared: int, width: int):
        end = tokenized.argmax(-1).cpu()  # (C,)
        count, own = len(end), end + 1 - shared  # (C,) positions behind the beginning
        self.shared = shared
        at_once = _texts_at_once(shared, own.float().mean().item(), width) if shared > 1 else 1
        self.sequences = -(-count // min(at_once, count))
        slots = -(-count // self.sequences)
        order = own.argsort(descending=True, stable=True)
        order = torch.cat([order, order[-1:].expand(slots * self.sequences - count)]).view(slots, -1)  # (slots, n)
        taken = own[order[:, 0]]  # (slots,)
        first = shared + taken.cumsum(0) - taken
        slot = torch.arange(slots).repeat_interleave(taken)  # (T-P,)
        position = torch.arange(shared, shared + len(slot)) - first[slot] + shared  # in the text
        self.texts, self.positions = order[slot], position.unsqueeze(1)  # (T-P, n), (T-P, 1)
        last = (first.unsqueeze(1) + own[order] - 1) * self.sequences
        last = last + torch.arange(self.sequences)  # (slots, n), row of each text's end
        self.ends = torch.empty_like(end).scatter(0, order.flatten()[:count], last.flatten()[:count])  # (C,)
        slot = torch.cat([slot.new_full((shared,), -1), slot])  # (T,)
        sees = ((slot == -1) | (slot == slot.unsqueeze(1))).tril()
        self.mask = torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)  # (T, T)

    def pack(self, x: Tensor, beginnings: Tensor | None = None) -> Tensor:
        """(C, length, w), length reaching the longest text's end → (T, B·n, w).

        beginnings: (B, P, w), as many times all texts behind a beginning of their own; those of ``x``, once, if None.
        """
        rows = (self.texts * x.shape[1] + self.positions).flatten().to(x.device)
        own = x.flatten(0, 1).index_select(0, rows).unflatten(0, (-1, 1, self.sequences))  # (T-P, 1, n, w)
        first = x[:1, : self.shared] if beginnings is None else beginnings
        first = first.transpose(0, 1).unsqueeze(2).expand(-1, -1, self.sequences, -1)  # (P, B, n, w)
        return torch.cat([first, own.expand(-1, first.shape[1], -1, -1)]).flatten(1, 2)

    def unpack(self, x: Tensor) -> Tensor:
        """What the tower made of each text's end: (T, B·n, w) → (B, C, w)."""
        rows = x.unflatten(1, (-1, self.sequences)).transpose(0, 1).flatten(1, 2)  # (B, T·n, w)
        return rows.index_select(1, self.ends.to(x.device))

    @contextmanager
    def masking(self, transformer: nn.Module, like: Tensor) -> Iterator[None]:
        """Let the blocks of OpenAI's transformer, which hold one causal mask of the full context, see this one."""
        blocks = transformer.resblocks
        before, mask = blocks[0].attn_mask.to(like), self.mask.to(like)  # stays where x is, as after a pass of its own
        for block in blocks:
            block.attn_mask = mask
        try:
            yield
        finally:
            for block in blocks:
                block.attn_mask = before


@contextmanager
def packed(text_encoder: nn.Module, tokenized: Tensor, learner: nn.Module, classless: set[str]) -> Iterator[None]:
    """Inside, a host's own text encoder runs packed if its transformer is OpenAI's and its texts begin alike.

    Args:
        tokenized: (C, 77), the ids of the host's texts.
        learner: makes their embeddings. They begin alike if nothing that is trained in it belongs to a class and the
            beginnings that reach the transformer are equal; the latter is looked at on each call.
        classless: names of the learner's parameters that belong to no class.
    """
    transformer = getattr(text_encoder, "transformer", None)
    trained = {name.partition(".")[0] for name, parameter in learner.named_parameters() if parameter.requires_grad}
    is_known = (
        all(getattr(block, "attn_mask", None) is not None for block in getattr(transformer, "resblocks", [None]))
        and trained <= classless
        and (not hasattr(learner, "ctx") or learner.ctx.dim() == 2)
        and getattr(learner, "class_token_position", "end") == "end"
    )
    if not is_known:
        yield
        return
    packing = Packing(tokenized, common_prefix(tokenized), transformer.resblocks[0].attn.embed_dim)
    whole = transformer.forward

    def forward(stream, *args):
        x = _first(stream)  # (77, C, w)
        beginning = x[: packing.shared]
        if not torch.equal(beginning, beginning[:, :1].expand_as(beginning)):
            return whole(stream, *args)
        with packing.masking(transformer, x):
            output = whole(_instead(stream, packing.pack(x.transpose(0, 1))), *args)
        return _instead(output, packing.unpack(_first(output)).expand(len(x), -1, -1))

    own = vars(transformer).get("forward")
    transformer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del transformer.forward
        else:
            transformer.forward = own


def _texts_at_once(shared: int, own: float, width: int) -> int:
    """How many texts of ``own`` positions cost least behind one beginning: c of P/c · (6w + P) + c · own²."""
    return max(1, round(((6 * width + shared) * shared) ** 0.5 / own))


def _first(stream) -> Tensor:
    return stream[0] if isinstance(stream, (list, tuple)) else stream


def _instead(stream, x: Tensor):
    return [x, *stream[1:]] if isinstance(stream, (list, tuple)) else x
