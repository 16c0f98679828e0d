"""Schedules: before which blocks tokens are merged or cut, what that costs, and one that costs a given share.

Pure functions of whole numbers. Operations are those of matrix products and convolutions, 2 for each multiplication,
attention's own among them; what scores, matches and merges is counted as well.
"""

from dataclasses import dataclass
from typing import NamedTuple

CENTRAL = 3  # pairs are looked for among so many times r tokens; `workbench/speed/accuracy.py` has others
RATES = 20  # of c, the tokens merged before block L-1, how many are tried from one whole number to the next


@dataclass(frozen=True)
class Tower:
    """A CLIP vision tower: N patch tokens, L blocks, width w, heads H, joint width d, pixels of a patch's side, and
    prompts that the host carries beside the patches."""

    tokens: int
    blocks: int
    width: int
    heads: int
    dim: int
    patch: int
    prompts: int = 0


class Step(NamedTuple):
    """Before ``block``, of ``tokens`` behind CLS that are or stand for patches, ``left`` go on, merged or cut: ``kept``
    of them, and one, if there is one, that stands for what cuts dropped, and is never merged."""

    block: int
    tokens: int
    kept: int
    left: int
    merges: bool

    @property
    def fused(self) -> int:
        return self.left - self.kept


def steps(
    tower: Tower, cuts: list[tuple[int, int]], merge: int | tuple[int, ...] = 0, fuses: bool = False
) -> list[Step]:
    """The way of a tower's tokens.

    Args:
        cuts: pairs (block, tokens kept), ascending; the last is (s, k). One that keeps all that is left cuts nothing.
        merge: r, merged before each of blocks 1…s-1 that has no cut, though never more than half of what is left; or
            r of blocks 0, 1, ….
        fuses: a cut lets the tokens that it drops go on as one more.
    """
    way, now, fused, kept_at, last = [], tower.tokens, 0, dict(cuts), cuts[-1][0]
    rates = (0, *(last - 1) * (merge,)) if isinstance(merge, int) else merge
    for block in range(last + 1):
        merges = block not in kept_at
        if merges and not rates[block]:
            continue
        kept = now - fused - min(rates[block], (now - fused) // 2) if merges else min(kept_at[block], now - fused)
        fused = fused if merges else int(fuses and kept < now)
        way.append(Step(block, now, kept, kept + fused, merges))
        now = kept + fused
    return way


def place(
    share: float, tower: Tower, fuses: bool = False, exact: bool = True
) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """Merges and a cut that spend a share of the host's operations: [(s, k)] and r of each block, as ``steps`` takes
    them.

    Before block b of 1…L-2 the nearest whole number to c (L-b) tokens are merged, most of them early, and before the
    last, s = L-1, of what is left at least half goes on, and at most two thirds where that comes within 0.01 of the
    share. Measured by ``workbench/speed/accuracy.py``: at equal operations as many merges before each block lose more,
    and so do cuts before two thirds of the depth.

    Raises:
        ValueError: no such schedule of this tower comes within 0.02 of it; if not ``exact`` the nearest is taken.
    """
    last, reached, lefts = tower.blocks - 1, {}, {}
    for rate in range(RATES * tower.tokens):
        merged = 0, *(round(rate / RATES * (tower.blocks - block)) for block in range(1, last))
        if merged in lefts:
            continue
        left = lefts[merged] = steps(tower, [(last, tower.tokens)], merged)[-1].left
        for k in range(max(2, -(-left // 2)), left + 1):
            reached[k, merged] = operations(tower, steps(tower, [(last, k)], merged, fuses)) / operations(tower)
        if left <= 2:
            break

    def badness(way):
        (k, merged), off = way, abs(reached[way] - share)
        return max(off, 0.01), 3 * k > 2 * lefts[merged], off

    k, merged = min(reached, key=badness)
    if exact and abs(reached[k, merged] - share) > 0.02:
        low, high = min(reached.values()), max(reached.values())
        raise ValueError(
            f"TRAINER.SPOTLIGHTER.SHARE = {share}: with {tower.blocks} blocks and {tower.tokens} tokens the nearest "
            f"schedules spend {low:.2f} to {high:.2f} of the operations; set SELECT_BLOCK, TOP_K and MERGE instead"
        )
    return [(last, k)], merged


def rivals(share: float, tower: Tower) -> dict[str, dict]:
    """Options of other ways to spend a share of the operations, as near to it as whole numbers come.

    ``merging``: nothing is cut, as many tokens merged before each block but the first (as in ToMe, arXiv 2210.09461).
    ``evit``: the same share of tokens kept before a quarter, a half and three quarters of the depth, the dropped ones
    going on as one (as in EViT, arXiv 2202.07800).
    """
    blocks, tokens = tower.blocks, tower.tokens
    quarters = sorted({round(blocks * part / 4) for part in (1, 2, 3)})  # a shallow tower has fewer

    def nearest(ways):
        return min(ways, key=lambda key: abs(operations(tower, ways[key]) / operations(tower) - share))

    merged = {r: steps(tower, [(blocks - 1, tokens)], r) for r in range(tokens // 2 + 1)}
    rates = [rate / 1000 for rate in range(50, 1000, 5)]
    kept = {rate: [max(2, round(tokens * rate**i)) for i, _ in enumerate(quarters, 1)] for rate in rates}
    cut = nearest({rate: steps(tower, list(zip(quarters, k, strict=True)), 0, True) for rate, k in kept.items()})
    *early, (block, k) = zip(quarters, kept[cut], strict=True)
    return {
        "merging": {"merge": nearest(merged), "select_block": blocks - 1, "top_k": tokens, "fuse_dropped": False},
        "evit": {"stages": tuple(early), "select_block": block, "top_k": k, "fuse_dropped": True},
    }


def operations(tower: Tower, way: list[Step] = ()) -> int:
    """Operations of one image's pass through the tower, with all that ``way`` asks for."""
    t, w = tower, tower.width
    total = 2 * t.tokens * 3 * t.patch**2 * w + 2 * w * t.dim  # patches, and the readout of CLS
    total += sum(_block(length, w) for length in lengths(tower, way))
    for step in way:
        if step.merges:
            movable = step.tokens - step.fused
            few = near(movable, step.tokens - step.left)
            total += 2 * (1 + step.tokens + t.prompts) * w * (w // t.heads)  # mean keys
            pairs = (few // 2) * (few - few // 2)  # A × B
            total += 2 * (2 * movable + pairs) * (w // t.heads)  # the mean key, likeness to it, and in pairs
        else:
            total += 4 * w * w + 2 * t.heads * w * (1 + step.tokens + t.prompts)  # CLS's query, and what it sees
            total += 2 * step.tokens * w * (step.kept < step.tokens and step.fused)  # the mean of what is dropped
    return total


def near(tokens: int, r: int) -> int:
    """Among how many tokens, those that stand out least, pairs are looked for where r of them are merged."""
    return min(tokens, max(CENTRAL * r, 2))


def lengths(tower: Tower, way: list[Step] = ()) -> list[int]:
    """How many positions each of the L blocks sees, CLS and prompts among them."""
    left = {step.block: step.left for step in way}
    now, seen = tower.tokens, []
    for block in range(tower.blocks):
        now = left.get(block, now)
        seen.append(1 + now + tower.prompts)
    return seen


def describe(tower: Tower, way: list[Step]) -> str:
    """One line for readers: ``196 tokens; merged to 118 before blocks 1-5; cut to 40 before block 6; 0.500 of …``."""
    words, share = [f"{tower.tokens} tokens"], operations(tower, way) / operations(tower)
    for group in groups(way):
        first, last = group[0], group[-1]
        where = f"block {first.block}" if first is last else f"blocks {first.block}-{last.block}"
        verb = "merged" if first.merges else "cut"
        words.append(f"{verb} to {last.left} before {where}")
    return "; ".join([*words, f"{share:.3f} of the host's operations"])


def groups(way: list[Step]) -> list[list[Step]]:
    """Steps that drop something; merges before blocks in a row are one group."""
    found: list[list[Step]] = []
    for step in (step for step in way if step.left < step.tokens):
        if found and step.merges and found[-1][-1].merges and step.block == found[-1][-1].block + 1:
            found[-1].append(step)
        else:
            found.append([step])
    return found


def _block(length: int, width: int) -> int:
    """Projections and MLP, 12 w² a token; queries with keys, and weights with values."""
    return 24 * length * width**2 + 4 * length**2 * width
