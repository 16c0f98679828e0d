"""Whether a host's tower is understood: with every token kept, the plug-in must give the host's own logits.

A hooked tower and an adapter come in; by how much the logits differ goes out. The host is left as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .token_stream import Pass, TokenStream, hidden_of

TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # the others: 1e-4


@torch.no_grad()
def check_invariance(stream: TokenStream, adapter, kept: list[int]) -> float:
    """See that the tower may be cut; where the host's prompts stand is found out where the adapter does not know it.

    Args:
        adapter: answers ``host_logits``, ``classify``, ``encode_text``, ``logit_scale``, ``layout``, ``prompts_first``.
        kept: how many tokens each cut keeps.

    Returns:
        max |Δ logits| / max |logits| on a random batch with all tokens kept, in an order of their own.

    Raises:
        ValueError: it exceeds the tolerance, or the tower does not take a shorter sequence; one line.
    """
    layout, name = adapter.layout, f"{adapter.name} ({type(adapter.model).__name__})"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *layout.image_size, generator=generator).to(layout.device, layout.dtype)
    limit = TOLERANCE.get(layout.dtype, 1e-4)
    way_out = "; an adapter that knows better (docs/your_own_host.md), or check=False (--no-check), gets past this"
    with undisturbed(adapter.model):
        expected = _answers(adapter, images)
        first = _prompts_first(adapter, images)
        guesses = (adapter.prompts_first, not adapter.prompts_first) if first is None else (first,)
        for guess in guesses:
            adapter.prompts_first = guess
            try:
                given, tower = _answers(adapter, images, stream)
                error = ((given - expected).abs().max() / expected.abs().max()).item()
                short = _answers(adapter, images, stream, kept)[0] if error <= limit else expected
            except (RuntimeError, IndexError, AssertionError) as reason:
                reason = " ".join(str(reason).split())[:160]
                raise ValueError(f"{name}: its tower does not take fewer tokens ({reason}){way_out}") from None
            if error <= limit and short.isfinite().all():
                return error
            if not tower.n_prompts:
                break
    raise ValueError(
        f"{name}: with every token kept, its logits differ by {error:.1e} of their scale (at most {limit:.0e}): "
        f"its tower or its classifier does something that is not known here{way_out}"
    )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module's attributes are what they were."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    for module, _ in before:
        module.training = False  # without .eval(), which some layers (LoRA) take as an occasion to change weights
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def _prompts_first(adapter, images) -> bool | None:
    """Whether prompts that enter the first block stand in front of the patches; None if none enter there.

    Prompts are the positions that do not depend on the image.
    """
    layout, seen = adapter.layout, []
    handle = layout.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(hidden_of(args[0])))
    try:
        adapter.classify(images)
    finally:
        handle.remove()
    hidden = seen[0].transpose(0, 1) if layout.batch_first else seen[0]
    same = (hidden == hidden[:, :1]).flatten(1).all(1)[layout.n_lead :]  # (S - lead,)
    n_prompts = len(same) - layout.n_tokens
    if n_prompts <= 0 or same.sum() != n_prompts:
        return None
    return bool(same[:n_prompts].all())


def _answers(adapter, images, stream=None, kept=None):
    """Logits (B, C) or, of a host that gives none by itself, unit embeddings (B, d), which decide them.

    With a stream the tokens go through it, all or as many as ``kept`` says, and the pass comes along.
    """
    if stream is None:
        own = adapter.host_logits(images)
        return (F.normalize(adapter.classify(images)[0], dim=-1) if own is None else own).float()
    numbers = kept or [None] * len(stream.blocks)
    with stream.selecting(*(partial(_backwards, k) for k in numbers), layout=adapter.layout) as tower:
        image, logits = adapter.classify(images)
    if logits is None:
        logits = F.normalize(image.float(), dim=-1)
        if adapter.classifies:
            text = F.normalize(adapter.encode_text().float(), dim=-1)
            logits = adapter.logit_scale.float() * logits @ text.T
    return logits.float(), tower


def _backwards(k: int | None, tower: Pass, hidden: Tensor) -> Tensor:
    """The last k tokens, or all, in reverse."""
    order = torch.arange(tower.n_now, device=hidden.device).flip(0)[:k]
    return tower.sequence(hidden, tower.tokens(hidden, order.expand(hidden.shape[1], -1)))
