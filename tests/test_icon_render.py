"""IconScenes' renderer against a slow one that goes pixel by pixel in whole numbers."""

import numpy as np
import pytest
import torch

from datasets import icon_drawings, icon_render

SIDE = 112


def pick(number, low, high):
    return low + (number * (high - low + 1) >> 16)


def blend(under, over, cover):
    return under + (over - under) * cover // 256


def literal_plan(n):
    """[(left, top, side)] of the main drawing and the smaller ones, and the ground's name."""
    side = pick(n[0], 40, 68)
    left, top = pick(n[1], 0, SIDE - side), pick(n[2], 0, SIDE - side)
    free = []
    for cell in range(25):
        x, y = 1 + 22 * (cell % 5), 1 + 22 * (cell // 5)
        beside = x + 22 <= left + 4 or x >= left + side - 4
        if beside or y + 22 <= top + 4 or y >= top + side - 4:
            free.append((n[5 + cell], cell, x, y))
    boxes = [(left, top, side)]
    for i, (_, _, x, y) in enumerate(sorted(free, reverse=True)[: pick(n[4], 1, 3)]):
        boxes.append((x, y, pick(n[30 + i], 14, 22)))
    return boxes, icon_render.GROUNDS[pick(n[3], 0, 5)]


def noise(n, size, cell, x, y):
    """Linear between the points of a grid, down first."""
    at = lambda row, column: n[60 + 9 * row + column] >> 8  # noqa: E731
    i, f, j, g = y // cell, y % cell, x // cell, x % cell
    down = [(at(i, k) * (cell - f) + at(i + 1, k) * f) // cell for k in (j, j + 1)]
    return (down[0] * (cell - g) + down[1] * g) // cell


def literal_ground(n, kind):
    first = [pick(n[40], 160, 230) + pick(n[41 + c], -30, 25) for c in range(3)]
    second = [value - pick(n[44], 25, 50) + pick(n[45 + c], -15, 15) for c, value in enumerate(first)]
    first, second = ([min(max(value, 0), 255) for value in colour] for colour in (first, second))
    dx, dy = icon_render.DIRECTIONS[pick(n[48], 0, 7)]
    corners = [dx * x + dy * y for x in (0, SIDE - 1) for y in (0, SIDE - 1)]
    low, high, period = min(corners), max(corners), pick(n[49], 5, 14)
    image = np.zeros((3, SIDE, SIDE), np.int64)
    for y in range(SIDE):
        for x in range(SIDE):
            along = dx * x + dy * y
            if kind == "plain":
                mix = 0
            elif kind == "gradient":
                mix = (along - low) * 256 // (high - low)
            elif kind == "striped":
                mix = along // (16 * period) % 2 * 256
            elif kind == "checkered":
                mix = (x // period + y // period) % 2 * 256
            elif kind == "cloudy":
                mix = noise(n, 5, 28, x, y)
            else:
                mix = 256 * (noise(n, 9, 14, x, y) > 150)
            for c in range(3):
                image[c, y, x] = blend(first[c], second[c], mix)
    return image


def tent(start, side):
    """How much of sprite pixel i is in picture pixel o, in 256ths, (112, 64)."""
    weight = np.zeros((SIDE, 64), np.int64)
    for o in range(SIDE):
        for i in range(64):
            apart = abs((2 * (o - start) + 1) * 64 - (2 * i + 1) * side)
            weight[o, i] = max(0, 2 * max(side, 64) - apart)
    return weight * 256 // weight.sum(1).max()


def literal_place(plane, box):
    left, top, side = box
    half = tent(top, side) @ plane.astype(np.int64) // 256
    whole = half @ tent(left, side).T // 256
    return whole + (whole > 127)


def literal_colours(n, box, under, cover, rgba):
    left, top, side = box
    if rgba[3].any():
        planes = [literal_place(rgba[c].astype(int) * rgba[3] // 255, box) for c in range(3)]
        where = literal_place(rgba[3], box)
        return np.stack([np.minimum(u * (256 - where) // 256 + p, 255) for u, p in zip(under, planes, strict=True)])
    dx, dy = icon_render.DIRECTIONS[pick(n[50], 0, 7)]
    image = under.copy()
    for y in range(SIDE):
        for x in range(SIDE):
            along = dx * (x - left - side // 2) + dy * (y - top - side // 2)
            edge = side * 16 // 5
            band = 0 if along < -edge else 1 if along < edge else 2
            for c in range(3):
                image[c, y, x] = blend(under[c, y, x], pick(n[51 + 3 * band + c], 20, 235), cover[y, x])
    return image


def literal_shift(n, image, domain):
    image = image.copy()
    if domain == "inverted":
        return 255 - image
    for y in range(SIDE):
        for x in range(SIDE):
            if domain == "pixel" and x % 4 == y % 4 == 0:
                for c in range(3):
                    image[c, y : y + 4, x : x + 4] = image[c, y : y + 4, x : x + 4].sum() // 16
            if domain == "dark":
                mixed = (x * 7919 + y * 104729 + n[150] * 611953 + 1) % (2**31 - 1)
                for _ in range(3):
                    mixed = (mixed ^ (mixed >> 7)) * 48271 % (2**31 - 1)
                image[:, y, x] = np.clip(image[:, y, x] // 3 + mixed % 21 - 10, 0, 255)
    return image


def literal(n, ink, rgba, domain):
    """(3, 112, 112) from a list of numbers, drawings (4, 64, 64) and the main one's colours (4, 64, 64)."""
    boxes, ground = literal_plan(n)
    image = literal_ground(n, ground)
    paint = [pick(n[33], 10, 60) + pick(n[34 + c], 0, 40) for c in range(3)]
    covers = [literal_place(plane, box) for plane, box in zip(ink, boxes, strict=False)]
    for cover in covers[1:]:
        image = np.stack([blend(image[c], paint[c], cover) for c in range(3)])
    if domain == "colour":
        image = literal_colours(n, boxes[0], image, covers[0], rgba)
    else:
        image = np.stack([blend(image[c], paint[c], covers[0]) for c in range(3)])
    return literal_shift(n, image, domain)


def some_scenes(n, seed=0):
    """Numbers (n, NUMBERS), ink (n, 4, 64, 64), colours (n, 4, 64, 64), every other one without any."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, icon_render.RANGE, (n, icon_render.NUMBERS))
    numbers[:, 3] = np.arange(n) % 6 * icon_render.RANGE // 6 + 1000  # all grounds
    ink, colour = (a.reshape(-1, *a.shape[2:]) for a in icon_drawings.drawings("test"))
    rgba = colour[colour[..., 3].any((1, 2))][:n].transpose(0, 3, 1, 2) * (np.arange(n) % 2)[:, None, None, None]
    return numbers, ink[rng.integers(0, len(ink), (n, 4))], rgba.astype(np.uint8)


def drawn(numbers, ink, rgba, domain):
    numbers, ink, rgba = (torch.from_numpy(np.array(a)) for a in (numbers, ink, rgba))
    which = torch.full((len(numbers),), icon_render.DOMAINS.index(domain))
    return icon_render.draw(numbers, icon_render.plan(numbers), ink, which, rgba).numpy()


@pytest.mark.parametrize("domain", icon_render.DOMAINS)
def test_pictures_are_those_of_a_slow_literal_renderer(domain):
    scenes = some_scenes(6, icon_render.DOMAINS.index(domain))
    few = slice(0, 6 if domain == "source" else 2)  # every ground once; with colours of its own, and without
    pictures = drawn(*scenes, domain)
    for picture, numbers, ink, rgba in zip(pictures[few], *(part[few] for part in scenes), strict=True):
        assert np.array_equal(picture, literal(numbers.tolist(), ink, rgba, domain))


def test_scenes_of_several_domains_may_be_drawn_at_once():
    numbers, ink, rgba = some_scenes(5)
    which = torch.arange(5)
    tensors = [torch.from_numpy(a) for a in (numbers, ink, rgba)]
    mixed = icon_render.draw(tensors[0], icon_render.plan(tensors[0]), tensors[1], which, tensors[2]).numpy()
    for i, domain in enumerate(icon_render.DOMAINS):
        assert np.array_equal(mixed[i], drawn(numbers, ink, rgba, domain)[i])


def test_every_scene_has_its_drawing_whole_inside_and_smaller_ones_beside_it():
    numbers = torch.randint(icon_render.RANGE, (2000, icon_render.NUMBERS), generator=torch.Generator().manual_seed(0))
    scene = icon_render.plan(numbers)
    for start in (scene.left, scene.top):
        assert (start >= 0).all() and (start + scene.side <= SIDE).all()
    assert scene.side.min() == icon_render.SMALLEST and scene.side.max() == icon_render.LARGEST
    left, top, side = scene.others.unbind(-1)
    there = side > 0
    assert set(there.sum(1).tolist()) == {1, 2, 3}
    across = torch.minimum(left + side, (scene.left + scene.side)[:, None]) - torch.maximum(left, scene.left[:, None])
    down = torch.minimum(top + side, (scene.top + scene.side)[:, None]) - torch.maximum(top, scene.top[:, None])
    assert (torch.minimum(across, down)[there] <= 4).all()
    assert sorted(scene.ground.unique().tolist()) == list(range(6))
