"""Which drawings are held out, and for what: a pure function of the drawings' masks, names and a seed."""

import zlib
from collections import defaultdict

import numpy as np

from tools import icon_art as art
from tools import icon_names as naming

SHOTS, VAL, TEST = 16, 4, 8
HELD = SHOTS + VAL + TEST
PALETTE = 7  # of the 28 at most: 4 shots, 1 for validation, 2 for testing
OTHERS = 25  # drawings of a concept that pre-training keeps, at least
UNLIKE = 0.1  # share of a concept's drawings that are not held out, being least like the others
ALIKE = 0.93  # cosine from which pre-training keeps one of two drawings of a name


def order(rows: list, ids: np.ndarray, seed: int) -> np.ndarray:
    """The ids in an order that depends on the drawings' own names and the seed alone."""
    return np.array(sorted(ids, key=lambda i: (zlib.crc32(f"{seed}/{rows[i][1]}:{rows[i][2]}".encode()), i)), int)


def similar(m: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Largest cosine (n,) of each mask with the others or their mirror images."""
    if not len(others):
        return np.zeros(len(m), np.float32)
    return np.maximum((m @ others.T).max(1), (m @ art.mirrored(others).T).max(1))


def relation(ids: np.ndarray, m: np.ndarray, s: np.ndarray, rows: list) -> np.ndarray:
    """Which of the ids count as one drawing (n, n) bool: near copies, and variants within a set or a family of sets."""
    near = np.maximum(m[ids] @ m[ids].T, m[ids] @ art.mirrored(m[ids]).T)
    outline = s[ids] @ s[ids].T
    family, prefix, base = (
        np.unique(v, return_inverse=True)[1]
        for v in (
            [naming.family(rows[i][1]) for i in ids],
            [rows[i][1] for i in ids],
            [naming.base(rows[i][1], rows[i][2]) for i in ids],
        )
    )
    same = lambda v: v[:, None] == v[None]  # noqa: E731
    named = same(base) & (same(prefix) | (near > 0.4) | (outline > 0.8))
    return (near >= art.COPY) | same(family) & ((near > art.FAMILY_COPY) | (outline > art.FAMILY_OUTLINE) | named)


def distinct(related: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Places of eligible drawings no two of which are relatives; those with fewest relatives are chosen first.

    So what goes with the drawings held out, and is lost to pre-training, is little.
    """
    kept: list = []
    for k in np.argsort(related.sum(1), kind="stable"):
        if eligible[k] and not related[k, kept].any():
            kept.append(int(k))
    return np.array(kept, int)


def typical(ids: np.ndarray, related: np.ndarray, m: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Which of the ids (n,) bool may be held out: not the tenth that is least like the five nearest other drawings.

    There stand drawings of something else by the same name: the caterpillar that an emoji "bug" is, a "tree" of files.
    """
    near = np.maximum(m[ids] @ m[ids].T, s[ids] @ s[ids].T)
    near[related] = -1
    score = np.sort(near, 1)[:, -5:].mean(1)
    return score >= np.quantile(score, UNLIKE)


def deal(kept: np.ndarray, palette: np.ndarray) -> dict:
    """28 of a concept's distinct drawings as shots, val and test, up to 7 palette drawings shared out among them.

    ``kept`` are ids, the ones to be preferred first; palette (n,) bool, of each drawing.
    """
    in_colour, plain = kept[palette[kept]], kept[~palette[kept]]
    take = max(min(PALETTE, len(in_colour)), HELD - len(plain))
    share = {"shots": round(take * SHOTS / HELD), "test": round(take * TEST / HELD)}
    share["val"] = take - share["shots"] - share["test"]
    in_colour, plain = np.sort(in_colour[:take]), np.sort(plain[: HELD - take])
    out, c, p = {}, 0, 0
    for split, n in (("test", TEST), ("shots", SHOTS), ("val", VAL)):
        k = share[split]
        out[split] = np.concatenate([in_colour[c : c + k], plain[p : p + n - k]]).astype(int)
        c, p = c + k, p + n - k
    return out


def one_side(held: dict, m: np.ndarray, palette: np.ndarray) -> None:
    """Put near copies that two concepts have (a sun and a gear, a ruler and a ticket) among the shots of both.

    Each changes places with a shot of its concept, coloured as it is, that has no copy elsewhere.
    """
    used = np.concatenate([ids for h in held.values() for ids in h.values()])
    of = np.concatenate([[c] * len(ids) for c, h in held.items() for ids in h.values()])
    near = np.maximum(m[used] @ m[used].T, m[used] @ art.mirrored(m[used]).T) >= art.COPY
    doubtful = set(used[(near & (of[:, None] != of[None])).any(1)].tolist())
    for sides in held.values():
        shots = sides["shots"]
        for which in ("test", "val"):
            for at in np.flatnonzero([i in doubtful for i in sides[which].tolist()]):
                out = sides[which][at]
                free = [k for k, i in enumerate(shots.tolist()) if i not in doubtful and palette[i] == palette[out]]
                sides[which][at], shots[free[0]] = shots[free[0]], out


def thin(ids: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Of the ids those that are not alike one before, for pre-training."""
    near = np.maximum(m[ids] @ m[ids].T, m[ids] @ art.mirrored(m[ids]).T) >= ALIKE
    kept: list = []
    for k in range(len(ids)):
        if not kept or not near[k, kept].any():
            kept.append(k)
    return ids[kept]


def by_name(rows: list, seed: int) -> dict[str, np.ndarray]:
    """The ids of each name's drawings, in the order of ``order``."""
    by = defaultdict(list)
    for i, r in enumerate(rows):
        by[r[0]].append(i)
    return {name: order(rows, np.array(ids), seed) for name, ids in sorted(by.items())}


def choose(rows: list, m: np.ndarray, s: np.ndarray, concepts: list, seed: int = 0) -> dict:
    """-> {concept: {split: ids}}, what is held out.

    rows: (name, set, icon's name, style, coloured?); m, s: masks and silhouettes (N, 576).
    """
    palette = np.array([r[4] for r in rows])
    by, held = by_name(rows, seed), {}
    for c in concepts:
        ids = by[c]
        related = relation(ids, m, s, rows)
        kept = distinct(related, typical(ids, related, m, s))
        if len(kept) < HELD:
            raise ValueError(f"{c!r} has {len(kept)} different drawings, {HELD} are held out: leave the concept out")
        held[c] = {which: ids[at] for which, at in deal(kept, palette[ids]).items()}
    one_side(held, m, palette)
    return held


def left_to_learn(rows: list, m: np.ndarray, s: np.ndarray, held: dict, seed: int = 0) -> tuple[dict, dict]:
    """-> {name: ids} for pre-training, figures: nothing that is held out, nor a copy or a variant of it.

    rows, m, s: as of ``choose``, whose answer is ``held``.
    """
    by = by_name(rows, seed)
    used = np.concatenate([ids for h in held.values() for ids in h.values()])
    taken = m[used]
    near = np.concatenate([similar(m[at : at + 2048], taken) for at in range(0, len(rows), 2048)])
    out = near >= art.COPY
    out[used] = True
    copies = int(out.sum()) - len(used)
    for c in held:  # its variants within a family go with it, under longer names, too
        ids = np.concatenate([by[n] for n in by if f"-{c}-" in f"-{n}-"])
        mine = np.isin(ids, np.concatenate(list(held[c].values())))
        out[ids[relation(ids, m, s, rows)[mine].any(0)]] = True
    variants = int(out.sum()) - copies - len(used)
    pre = {}
    for name, ids in by.items():
        left = thin(ids[~out[ids]], m)
        if name in held and len(left) < OTHERS:
            raise ValueError(f"{name!r} leaves {len(left)} drawings to pre-training, {OTHERS} are wanted: leave it out")
        if len(left) >= 3 or name in held:
            pre[name] = np.sort(left)
    return pre, {"held out": len(used), "near copies left out": copies, "variants left out": variants}
