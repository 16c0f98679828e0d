"""IconScenes' renderer: one drawing on a procedural ground among smaller ones, from 16-bit numbers, on any device.

Comes in: numbers (B, NUMBERS) that fix everything, drawings (B, 1 + DISTRACTORS, 64, 64). Goes out: pictures
(B, 3, 112, 112) uint8. Every intermediate value is a whole number that float32 holds exactly, so a picture is the same
byte for byte on every CPU and GPU. The data set draws its few scenes with it, pre-training its millions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 112  # px, side of a scene: 14 x 14 patches of 8 px
SPRITE = 64  # px, side of a drawing
SMALLEST, LARGEST = 40, 68  # px, longer side of the drawing that the scene is about
DISTRACTORS, CELL = 3, 22  # smaller drawings, each in a cell of its own of the 5 x 5 cells of 22 px
DOMAINS = ("source", "inverted", "colour", "pixel", "dark")
GROUNDS = ("plain", "gradient", "striped", "checkered", "cloudy", "spotted")
DIRECTIONS = ((16, 0), (15, 6), (11, 11), (6, 15), (0, 16), (-6, 15), (-11, 11), (-15, 6))  # of length 16
NUMBERS = 160
RANGE = 1 << 16  # numbers are in 0…RANGE-1


@dataclass
class Plan:
    """What the numbers say of B scenes, before anything is drawn; all (B, …) whole numbers."""

    side: Tensor  # of the main drawing, px
    left: Tensor
    top: Tensor
    ground: Tensor  # index into GROUNDS
    others: Tensor  # (B, DISTRACTORS, 3): left, top, side; side 0 where there is none


def plan(numbers: Tensor, smallest: int = SMALLEST, largest: int = LARGEST) -> Plan:
    """Places and sizes from numbers (B, NUMBERS) int64."""
    side = _pick(numbers[:, 0], smallest, largest)
    left, top = (_pick(numbers[:, column], 0, SIZE - side) for column in (1, 2))
    ground = _pick(numbers[:, 3], 0, len(GROUNDS) - 1)
    n_others = _pick(numbers[:, 4], 1, DISTRACTORS)
    corner = torch.arange(5, device=numbers.device) * CELL + 1
    free_x = (corner + CELL <= left[:, None] + 4) | (corner >= (left + side)[:, None] - 4)  # (B, 5)
    free_y = (corner + CELL <= top[:, None] + 4) | (corner >= (top + side)[:, None] - 4)
    free = (free_y[:, :, None] | free_x[:, None, :]).flatten(1)  # (B, 25)
    order = numbers[:, 5:30] * 25 + torch.arange(25, device=numbers.device)  # no two alike
    score, cell = torch.where(free, order, -1).topk(DISTRACTORS, dim=1)
    there = (score >= 0) & (torch.arange(DISTRACTORS, device=numbers.device) < n_others[:, None])
    small = _pick(numbers[:, 30 : 30 + DISTRACTORS], 14, CELL) * there
    others = torch.stack([corner[cell % 5], corner[cell // 5], small], dim=-1)
    return Plan(side, left, top, ground, others)


def draw(numbers: Tensor, scene: Plan, ink: Tensor, domain: Tensor, colour: Tensor | None = None) -> Tensor:
    """Pictures of planned scenes.

    Args:
        numbers: (B, NUMBERS) int64 in 0…65535, those that the plan was made from.
        ink: (B, 1 + DISTRACTORS, 64, 64) uint8, how much of each pixel is drawn; first the scene's own.
        domain: (B,) index into DOMAINS.
        colour: (B, 4, 64, 64) uint8, the main drawing's own colours and where they are; where nothing is, domain
            ``colour`` paints the ink in three bands. None: nowhere.

    Returns:
        (B, 3, 112, 112) uint8.
    """
    image, paint = _ground(numbers, scene.ground), _spread(_paint(numbers))  # (B, 3, 112, 112), (B, 3, 1, 1)
    boxes = torch.cat([torch.stack([scene.left, scene.top, scene.side], 1)[:, None], scene.others], 1)  # (B, 1+K, 3)
    cover = _place(ink, boxes)  # (B, 1+K, 112, 112)
    for other in range(1, cover.shape[1]):
        image = _blend(image, paint, cover[:, other, None])
    painted = _blend(image, paint, cover[:, 0, None])
    rows = (domain == DOMAINS.index("colour")).nonzero()[:, 0]
    if len(rows):
        under = image[rows]
        bands = _bands(numbers[rows], scene.left[rows], scene.top[rows], scene.side[rows])
        own = _blend(under, bands, cover[rows, 0, None])
        if colour is not None:
            planes = _place(_premultiplied(colour[rows]), boxes[rows, :1].expand(-1, 4, -1))  # (b, 4, 112, 112)
            whole = ((under * (256 - planes[:, 3:]) / 256).floor() + planes[:, :3]).clamp(max=255)
            own = torch.where(colour[rows, 3].flatten(1).amax(1)[:, None, None, None] > 0, whole, own)
        painted[rows] = own
    return _shift(painted, numbers, domain).to(torch.uint8)


def _pick(number: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """A whole number from low to high, both included, by a number in 0…65535."""
    return low + (number * (high - low + 1) >> 16)


def _spread(values: Tensor) -> Tensor:
    return values.float()[:, :, None, None]


def _blend(under: Tensor, over: Tensor, cover: Tensor) -> Tensor:
    """``over`` on ``under`` where ``cover``, 0…256, says so."""
    return under + ((over - under) * cover / 256).floor()


def _paint(numbers: Tensor) -> Tensor:
    """The dark colour of what is drawn: (B, 3)."""
    return _pick(numbers[:, 33:34], 10, 60) + _pick(numbers[:, 34:37], 0, 40)


def _ground(numbers: Tensor, kind: Tensor) -> Tensor:
    """A light colour that goes over into another by one of GROUNDS: (B, 3, 112, 112), whole numbers in 0…255."""
    device, at = numbers.device, torch.arange(SIZE, device=numbers.device)
    first = _pick(numbers[:, 40:41], 160, 230) + _pick(numbers[:, 41:44], -30, 25)  # (B, 3)
    second = first - _pick(numbers[:, 44:45], 25, 50) + _pick(numbers[:, 45:48], -15, 15)
    step = torch.tensor(DIRECTIONS, device=device)[_pick(numbers[:, 48], 0, len(DIRECTIONS) - 1)]  # (B, 2)
    along = step[:, :1, None] * at + step[:, 1:, None] * at[:, None]  # (B, 112, 112)
    low, high = along.amin((1, 2), keepdim=True), along.amax((1, 2), keepdim=True)
    period = _pick(numbers[:, 49], 5, 14)[:, None, None]
    grid = (numbers[:, 60:141] >> 8).reshape(-1, 9, 9).float()  # noise in 0…255
    coarse = _stretch(grid[:, :5, :5], 28)
    kinds = (
        torch.zeros_like(coarse),
        ((along - low) * 256 // (high - low)).float(),
        (along // (16 * period) % 2 * 256).float(),
        ((at // period + at[:, None] // period) % 2 * 256).float(),
        coarse,
        (_stretch(grid, 14) > 150).float() * 256,
    )
    mix = torch.stack(kinds, 1)[torch.arange(len(kind), device=device), kind][:, None]  # (B, 1, 112, 112)
    return _blend(_spread(first.clamp(0, 255)), _spread(second.clamp(0, 255)), mix)


def _stretch(grid: Tensor, cell: int) -> Tensor:
    """Values on a grid of points, linearly in between: (B, n, n) → (B, 112, 112) with (n - 1) cells of ``cell`` px."""
    at = torch.arange(SIZE, device=grid.device)
    point = torch.arange(grid.shape[-1], device=grid.device)
    weight = (cell - (at[:, None] - point * cell).abs()).clamp(min=0).float()  # (112, n), rows sum to cell
    return (_exact((_exact(weight, grid) / cell).floor(), weight.T) / cell).floor()


def _place(planes: Tensor, boxes: Tensor) -> Tensor:
    """Planes (B, n, 64, 64) in 0…255 scaled into square boxes (B, n, 3) of left, top, side: (B, n, 112, 112), 0…256.

    A tent filter as two matrix products with whole weights that add up to at most 256.
    """
    across, down = _weights(boxes[..., 0], boxes[..., 2]), _weights(boxes[..., 1], boxes[..., 2])  # (B, n, 112, 64)
    half = (_exact(down, planes.float()) / 256).floor()  # (B, n, 112, 64)
    whole = (_exact(half, across.transpose(-1, -2)) / 256).floor()
    return whole + (whole > 127)  # 255 → 256


def _weights(start: Tensor, side: Tensor) -> Tensor:
    """Share in 1/256 of sprite pixel i in picture pixel o: (B, n) → (B, n, 112, 64)."""
    o, i = (torch.arange(n, device=start.device) for n in (SIZE, SPRITE))
    start, size = start[..., None, None], side[..., None, None].clamp(min=1)
    apart = ((2 * (o[:, None] - start) + 1) * SPRITE - (2 * i + 1) * size).abs()  # in 1/(2·side) sprite pixels
    weight = (2 * size.clamp(min=SPRITE) - apart).clamp(min=0).float()
    total = weight.sum(-1, keepdim=True).amax(-2, keepdim=True).clamp(min=1)
    return (weight * 256 / total).floor() * (side > 0)[..., None, None]


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """A product of whole numbers below 2²⁴ in float32, whatever precision a GPU's products have otherwise."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b  # factors of at most 8 bits and a sign survive TF32's 11


def _bands(numbers: Tensor, left: Tensor, top: Tensor, side: Tensor) -> Tensor:
    """Three colours in bands across the main drawing: (B, 3, 112, 112)."""
    at = torch.arange(SIZE, device=numbers.device)
    step = torch.tensor(DIRECTIONS, device=numbers.device)[_pick(numbers[:, 50], 0, len(DIRECTIONS) - 1)]
    along = step[:, :1, None] * (at - (left + side // 2)[:, None])[:, None, :]
    along = along + step[:, 1:, None] * (at - (top + side // 2)[:, None])[:, :, None]  # (B, 112, 112)
    edge = (side * 16 // 5)[:, None, None]
    colours = _pick(numbers[:, 51:60].reshape(-1, 3, 3), 20, 235)  # (B, colour, channel)
    spread = [_spread(colours[:, band]) for band in range(3)]
    inner = torch.where((along < edge)[:, None], spread[1], spread[2])
    return torch.where((along < -edge)[:, None], spread[0], inner)


def _premultiplied(colour: Tensor) -> Tensor:
    planes = colour.float()
    return torch.cat([(planes[:, :3] * planes[:, 3:] / 255).floor(), planes[:, 3:]], 1)


def _shift(image: Tensor, numbers: Tensor, domain: Tensor) -> Tensor:
    """The source's picture as each scene's domain shows it: (B, 3, 112, 112)."""
    for name, shift in (("inverted", _inverted), ("pixel", _pixelated), ("dark", _darkened)):
        rows = (domain == DOMAINS.index(name)).nonzero()[:, 0]
        if len(rows):
            image[rows] = shift(image[rows], numbers[rows])
    return image


def _inverted(image: Tensor, _) -> Tensor:
    return 255 - image


def _pixelated(image: Tensor, _) -> Tensor:
    """Blocks of 4 px."""
    blocks = image.unflatten(2, (-1, 4)).unflatten(4, (-1, 4))  # (B, 3, 28, 4, 28, 4)
    return (blocks.sum((3, 5), keepdim=True) / 16).floor().expand_as(blocks).reshape(image.shape)


def _darkened(image: Tensor, numbers: Tensor) -> Tensor:
    """A third of the light, and noise of ±10 in each pixel."""
    at = torch.arange(SIZE, device=image.device)
    mixed = (at * 7919 + at[:, None] * 104729 + numbers[:, 150, None, None] * 611953 + 1) % 2147483647  # (B, 112, 112)
    for _ in range(3):
        mixed = (mixed ^ (mixed >> 7)) * 48271 % 2147483647
    noise = (mixed % 21 - 10).float()[:, None]
    return ((image / 3).floor() + noise).clamp(0, 255)
