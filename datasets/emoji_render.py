"""EmojiScenes' renderer: one emoji on a cluttered background, a pure function of (seed, class, vendor, number).

Used twice: ``datasets/emoji_scenes.py`` writes few-shot and test scenes with it, and ``tools/pretrain_tiny_clip.py``
draws its training scenes and captions with it, so the benchmark and the pre-training differ by vendor alone.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 96  # px, side of a scene
SMALLEST, LARGEST, STEP = 40, 64, 8  # px, longer side of a sprite and the grid of its corner
VENDORS = (
    "noto", "noto-v1", "twemoji", "openmoji", "fluent-emoji", "fluent-emoji-flat", "fxemoji", "emojione", "emojione-v1",
)  # fmt: skip
SPRITES = Path(__file__).parent / "emoji_sprites"

COLOURS = {
    "red": (200, 60, 55), "orange": (230, 140, 50), "yellow": (235, 215, 90), "green": (80, 160, 80),
    "teal": (60, 150, 150), "blue": (65, 105, 200), "purple": (130, 80, 170), "pink": (235, 150, 185),
    "brown": (130, 90, 60), "white": (240, 240, 240), "gray": (135, 135, 135), "black": (35, 35, 40),
}  # fmt: skip
BACKGROUNDS = ("gradient", "striped", "cloudy", "spotted", "checkered")
TINTS = {
    "reddish": (1.15, 0.9, 0.9), "greenish": (0.9, 1.12, 0.9), "bluish": (0.9, 0.92, 1.15), "warm": (1.1, 1.02, 0.85),
}  # fmt: skip
PLACES = (
    ("in the top left corner", "at the top", "in the top right corner"),
    ("on the left", "in the middle", "on the right"),
    ("in the bottom left corner", "at the bottom", "in the bottom right corner"),
)
DOMAINS = ("normal", "pixelated", "dark", "gray", "sepia", "swapped", "blurred", "faded")
SEPIA = np.array([[0.39, 0.35, 0.27], [0.77, 0.69, 0.53], [0.19, 0.17, 0.13]], dtype=np.float32)  # RGB in → RGB out
GRID = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE - 0.5  # pixel centres in [-0.5, 0.5]


@dataclass
class Scene:
    """One picture and everything that a caption can say about it."""

    image: np.ndarray  # (96, 96, 3) uint8
    box: tuple[int, int, int, int]  # left, top, right, bottom of the sprite, px
    size: str
    place: str
    tint: str  # "" where the light is white
    background: str
    domain: str


def concepts(folder: Path = SPRITES) -> list[str]:
    """Class names in their fixed order, with spaces: ``crescent moon``."""
    return [name.replace("-", " ") for name in json.loads((folder / "concepts.json").read_text())["concepts"]]


@cache
def sprite_sheet(vendor: str, folder: Path = SPRITES) -> list[Image.Image]:
    """The vendor's sprites, RGBA 64 × 64, in the order of ``concepts``.

    Raises FileNotFoundError if this vendor's sheet is not in ``folder`` (only the benchmark's vendors are bundled).
    """
    path = folder / f"{vendor}.webp"
    if not path.exists():
        raise FileNotFoundError(f"no sprites of vendor {vendor!r} in {folder}: make them with tools/build_sprites.py")
    record = json.loads((folder / "concepts.json").read_text())
    side, columns = record["sprite"], record["columns"]
    sheet = Image.open(path).convert("RGBA")
    boxes = ((i % columns * side, i // columns * side) for i in range(len(record["concepts"])))
    return [sheet.crop((x, y, x + side, y + side)) for x, y in boxes]


def _background(kind: str, first, second, rng) -> np.ndarray:
    """A (96, 96, 3) float32 picture that mixes two colours by one of the five patterns."""
    angle = rng.random() * 2 * math.pi
    along = GRID[None, :] * math.cos(angle) + GRID[:, None] * math.sin(angle)  # (96, 96)
    if kind == "gradient":
        mix = np.clip(along + 0.5, 0, 1)
    elif kind == "striped":
        mix = (np.sin(along * (20 + 40 * rng.random()) + 6.3 * rng.random()) > 0).astype(np.float32)
    elif kind == "checkered":
        period = 12 + 20 * rng.random()
        across = -GRID[None, :] * math.sin(angle) + GRID[:, None] * math.cos(angle)
        mix = ((np.floor(along * SIZE / period) + np.floor(across * SIZE / period)) % 2).astype(np.float32)
    else:  # value noise; spots are the same with a hard edge
        cells = 4 if kind == "cloudy" else 8
        noise = Image.fromarray(rng.random((cells, cells)).astype(np.float32), mode="F")
        mix = np.clip(np.asarray(noise.resize((SIZE, SIZE), Image.BICUBIC)), 0, 1)
        mix = mix if kind == "cloudy" else (mix > 0.55).astype(np.float32)
    return first + mix[..., None] * (second - first)


def apply_domain(image: np.ndarray, domain: str, rng) -> np.ndarray:
    """Shift a (96, 96, 3) uint8 picture into one of ``DOMAINS``."""
    if domain == "normal":
        return image
    if domain == "pixelated":  # 3 px blocks
        small = Image.fromarray(image).resize((SIZE // 3, SIZE // 3), Image.BOX)
        return np.asarray(small.resize((SIZE, SIZE), Image.NEAREST))
    if domain == "blurred":
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.6)))
    if domain == "swapped":  # a rotation of the three channels
        return image[..., [1, 2, 0]]
    x = image.astype(np.float32)
    if domain == "dark":
        x = x * 0.35 + (rng.random((SIZE, SIZE, 1)).astype(np.float32) - 0.5) * 24
    elif domain == "gray":
        x = np.repeat(x @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32), 3, axis=2)
    elif domain == "sepia":
        x = x @ SEPIA
    elif domain == "faded":
        x = 150 + x * 0.4
    else:
        raise ValueError(f"unknown domain {domain!r}; choose one of {', '.join(DOMAINS)}")
    return np.clip(x, 0, 255).astype(np.uint8)


def render_scene(
    seed: int, label: int, vendor: str, number: int, domain: str = "normal", folder: Path = SPRITES
) -> Scene:
    """Scene ``number`` of class ``label`` as ``vendor`` draws it: the same arguments give the same picture.

    Only uniform draws are taken from the generator, whose stream NumPy keeps stable across versions.
    """
    rng = np.random.default_rng([seed, label, VENDORS.index(vendor), number])
    pick = lambda options: options[int(rng.random() * len(options))]  # noqa: E731

    names = list(COLOURS)
    first, second = pick(names), pick(names)
    kind = pick(BACKGROUNDS)
    jitter = (rng.random((2, 3)) - 0.5) * 40
    colours = np.array([COLOURS[first], COLOURS[second]]) + jitter
    canvas = _background(kind, *colours, rng)
    picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))

    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.random() * 5)):  # small distractors under the sprite
        x, y, r = rng.random() * SIZE, rng.random() * SIZE, 3 + rng.random() * 6
        colour = tuple(int(256 * c) for c in rng.random(3))
        if rng.random() < 0.5:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        else:
            draw.regular_polygon((x, y, r), 3 + int(rng.random() * 3), int(rng.random() * 360), fill=colour)

    side = SMALLEST + STEP * int(rng.random() * ((LARGEST - SMALLEST) / STEP + 1))
    sprite = sprite_sheet(vendor, folder)[label].resize((side, side), Image.BICUBIC)
    sprite = sprite.rotate((rng.random() - 0.5) * 24, Image.BICUBIC)
    left, top = (STEP * int(rng.random() * ((SIZE - side) / STEP + 1)) for _ in "xy")
    picture.paste(sprite, (left, top), sprite)

    image = np.asarray(picture)
    tint = pick(list(TINTS)) if rng.random() < 0.4 else ""
    if tint:
        image = np.clip(image * np.array(TINTS[tint], dtype=np.float32), 0, 255).astype(np.uint8)
    image = apply_domain(image, domain, rng)

    third = lambda centre: min(2, int(3 * (centre - SMALLEST / 2) / (SIZE - SMALLEST)))  # noqa: E731
    return Scene(
        image=image,
        box=(left, top, left + sprite.width, top + sprite.height),
        size="small" if side < 45 else "large" if side > 55 else "medium",
        place=PLACES[third(top + sprite.height / 2)][third(left + sprite.width / 2)],
        tint=tint,
        background=f"{first} and {second} {kind}" if first != second else f"{first} {kind}",
        domain=domain,
    )
