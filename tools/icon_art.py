"""One drawing from its SVG: rendered, centred, of one size, as ink and colours; and what near copies are told by."""

import io

import numpy as np
from PIL import Image

SIDE, LONG, BIG = 64, 60, 96  # px: the drawing, its longer side, and the side it is rendered at
COPY = 0.85  # cosine of two masks from which two drawings count as one
FAMILY_COPY, FAMILY_OUTLINE = 0.7, 0.93  # within a family of sets: of masks, of silhouettes
MASK = 24  # px


def _render(body: str, box: tuple) -> Image.Image:
    import resvg_py

    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box[0]} {box[1]} {box[2]} {box[3]}" width="{BIG}" height="{BIG}">{body}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def render(icon: dict, general: dict) -> np.ndarray | None:
    """RGBA (64, 64, 4) uint8, the longer side of the drawing 60 px and centred; None if there is (nearly) nothing."""
    size = {k: icon.get(k, general.get(k, e)) for k, e in (("left", 0), ("top", 0), ("width", 16), ("height", 16))}
    box = (size["left"], size["top"], size["width"], size["height"])
    body = icon["body"].replace("currentColor", "#000")
    for attempt in (0, 1):
        im = _render(body, box)
        if im.size != (BIG, BIG):
            return None
        at = im.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
        if at is None:
            return None
        side = max(at[2] - at[0], at[3] - at[1])
        if side >= LONG or attempt:
            break
        # small on its ground: drawn again, only what there is (the picture lies in the middle of a square)
        unit = max(box[2], box[3]) / BIG
        x0, y0 = box[0] - (max(box[2], box[3]) - box[2]) / 2, box[1] - (max(box[2], box[3]) - box[3]) / 2
        margin = 1.5 * unit
        span = side * unit + 2 * margin
        box = (
            x0 + (at[0] + at[2]) / 2 * unit - span / 2,
            y0 + (at[1] + at[3]) / 2 * unit - span / 2,
            span,
            span,
        )
    if side < 8:
        return None
    scale = LONG / side
    w, h = (max(1, round((at[i + 2] - at[i]) * scale)) for i in (0, 1))
    if min(w, h) < 6:
        return None
    cut = im.convert("RGBa").crop(at).resize((w, h), Image.BOX if scale < 0.75 else Image.BILINEAR).convert("RGBA")
    out = Image.new("RGBA", (SIDE, SIDE))
    out.paste(cut, ((SIDE - w) // 2, (SIDE - h) // 2))
    a = np.asarray(out).copy()
    a[a[..., 3] == 0] = 0
    return a


def coloured(rgba: np.ndarray) -> bool:
    """Whether a drawing has colours of its own: over 4 % of its ink is not gray."""
    inked = rgba[..., 3] > 128
    rgb = rgba[inked][:, :3].astype(int)
    return bool(len(rgb) and (rgb.max(1) - rgb.min(1) > 40).mean() > 0.04)


def levels(a: np.ndarray) -> np.ndarray:
    """uint8 in 16 levels, 0 and 255 among them: what is kept of a drawing's coverage."""
    return ((a.astype(np.uint16) * 15 + 127) // 255 * 17).astype(np.uint8)


def ink(rgba: np.ndarray) -> np.ndarray:
    """Coverage (64, 64) uint8 of a drawing as if it were made with one pen.

    Black drawings: their alpha. Others: alpha x (0.15 + 0.55 x darkness, stretched over the drawing's own range), and
    full ink where brightness or coverage changes steeply, so that a face or an umbrella shows its inside.
    """
    alpha = rgba[..., 3].astype(np.float32) / 255
    light = rgba[..., :3].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    inked = alpha > 0.5
    if not inked.any() or light[inked].max() < 0.04:
        return rgba[..., 3].copy()
    lo, hi = np.percentile(light[inked], (5, 95))
    flat = hi - lo < 0.08
    dark = np.full_like(light, 0.8) if flat else 1 - np.clip((light - lo) / (hi - lo), 0, 1)
    tone = alpha * (0.15 + 0.55 * dark)
    # steps of what one sees on white paper, and of the coverage itself
    seen = np.pad(alpha * dark * (0 if flat else 1), 1)
    cover = np.pad(alpha, 1)
    step = np.zeros_like(alpha)
    for v, gain in ((seen, 1.1), (cover, 0.9)):
        gx = np.abs(v[1:-1, 2:] - v[1:-1, :-2])
        gy = np.abs(v[2:, 1:-1] - v[:-2, 1:-1])
        step = np.maximum(step, gain * np.hypot(gx, gy))
    edge = np.clip(1.3 * step - 0.25, 0, 1) * (alpha > 0.1)
    return np.round(255 * np.clip(np.maximum(tone, edge), 0, 1)).astype(np.uint8)


def masks(inks: np.ndarray) -> np.ndarray:
    """(n, 64, 64) uint8 -> (n, 576): the drawing on 24 x 24 px, filling them, less its mean, of unit length."""
    out = np.zeros((len(inks), MASK * MASK), np.float32)
    for i, a in enumerate(inks):
        ys, xs = (np.flatnonzero((a > 24).any(k)) for k in (1, 0))
        if len(ys):
            cut = Image.fromarray(a[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1])
            out[i] = np.asarray(cut.resize((MASK, MASK), Image.BOX), np.float32).ravel()
    return _unit(out)


def silhouettes(alphas: np.ndarray) -> np.ndarray:
    """(n, 64, 64) uint8 -> (n, 576): the same with every hole filled, so that an outline equals its solid variant."""
    inked = np.zeros((len(alphas), MASK, MASK), bool)
    for i, a in enumerate(alphas):
        ys, xs = (np.flatnonzero((a > 24).any(k)) for k in (1, 0))
        if len(ys):
            cut = Image.fromarray(a[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1])
            inked[i] = np.asarray(cut.resize((MASK, MASK), Image.BOX)) > 50
    wall = np.pad(inked, ((0, 0), (1, 1), (1, 1)))
    outside = np.zeros_like(wall)
    outside[:, [0, -1]] = True
    outside[:, :, [0, -1]] = True
    while True:  # grows from the rim until it meets the drawing
        grown = outside.copy()
        grown[:, 1:] |= outside[:, :-1]
        grown[:, :-1] |= outside[:, 1:]
        grown[:, :, 1:] |= outside[:, :, :-1]
        grown[:, :, :-1] |= outside[:, :, 1:]
        grown &= ~wall
        if (grown == outside).all():
            break
        outside = grown
    return _unit((~outside[:, 1:-1, 1:-1]).reshape(-1, MASK * MASK).astype(np.float32))


def _unit(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(1, keepdims=True)
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-6)


def mirrored(m: np.ndarray) -> np.ndarray:
    """The masks of the drawings mirrored left to right."""
    return m.reshape(-1, MASK, MASK)[:, :, ::-1].reshape(-1, MASK * MASK)
