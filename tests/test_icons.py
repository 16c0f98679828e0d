"""The drawings of IconScenes: different ones on each side of the split, by sets whose licences allow it; and what is
rendered from them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import icon_drawings, icon_render
from datasets import icon_drawings as bundle
from tools import build_icons, icon_art, icon_names, icon_pack, icon_splits

ROOT = Path(__file__).parents[1]


def test_no_test_drawing_has_a_near_copy_among_shots_or_validation():
    found = build_icons.check()
    assert found["limit"] == icon_art.COPY == 0.85
    assert max(v for k, v in found.items() if k != "limit") < icon_art.COPY
    # the measure can tell: a drawing shifted by a pixel, or mirrored, is a near copy of itself
    ink = bundle.drawings("test")[0][::10, 0]
    for again in (np.roll(ink, 1, axis=2), ink[:, :, ::-1]):
        near = icon_splits.similar(icon_art.masks(again), icon_art.masks(ink))
        assert (near > icon_art.COPY).all()


def test_pre_training_holds_no_near_copy_of_a_drawing_held_out_and_enough_others_of_each_concept():
    figures = bundle.index()["figures"]
    for split in bundle.SPLITS:
        assert 0 < figures[f"{split} to pre-training"] < icon_art.COPY
    assert figures["fewest of a concept"] >= 25


def test_every_concept_has_16_shots_4_for_validation_and_8_test_drawings_all_different():
    names = bundle.concepts()
    assert len(names) == len(set(names)) >= 120 and names == sorted(names) == [n.lower() for n in names]
    for split, n in {"shots": 16, "val": 4, "test": 8}.items():
        ink, colour = bundle.drawings(split)
        assert ink.shape == (len(names), n, 64, 64) and colour.shape == (*ink.shape, 4)
        assert ink.dtype == colour.dtype == np.uint8
        assert ((ink > 0).sum((2, 3)) >= 60).all()
        coloured = colour[..., 3].any((2, 3))
        assert 0.1 < coloured.mean() < 0.4
        extent = [ink.any(axis).sum(-1) for axis in (2, 3)]  # px, across and down
        assert np.maximum(*extent).max() == 60 and (np.maximum(*extent) >= 54).mean() > 0.98
    rows = bundle.index()["drawings"]
    assert len({d for row in rows for d in row}) == 28 * len(names)


def test_variants_within_a_family_of_sets_stay_on_one_side():
    for name, row in zip(bundle.concepts(), bundle.index()["drawings"], strict=True):
        parts = [d.split(":", 1) for d in row]
        drawn = [(p, icon_names.base(p, icon)) for p, icon in parts]
        assert len(set(drawn)) == len(drawn), name


def test_every_licence_is_one_that_allows_it_and_notice_names_every_set():
    index, choice = bundle.index(), icon_names.choice()
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    used = {d.split(":")[0] for row in index["drawings"] for d in row}
    assert used == set(index["sets"])
    assert not used & {s for sets in choice["sets left out"].values() for s in sets}
    for prefix, info in index["sets"].items():
        assert info["licence"] in choice["licences"]
        assert not {"NC", "SA", "ND"} & set(info["licence"].split("-")) and "GPL" not in info["licence"]
        assert f"| `{prefix}` | {info['name']} | {info['author']} | {info['licence']} |" in notice


def test_names_lose_their_variants_and_synonyms_meet():
    assert icon_names.normal("ph", "dog-duotone", ("duotone", "bold")) == "dog"
    assert icon_names.normal("fluent", "animal-dog-24-filled", ("24-filled",)) == "dog"
    assert (
        icon_names.normal("ic", "baseline-home", (), ("baseline",)) == icon_names.normal("bi", "house-fill") == "house"
    )
    assert icon_names.normal("bi", "traffic-light") == "traffic-light"
    for name in ("arrow-left", "letter-a", "github", "user-plus", "dollar-sign", "flag-for-france", "text-bold"):
        assert icon_names.left_out(name), name
    for name in bundle.concepts():
        assert name in {icon_names.prompt(n) for n in icon_names.choice()["concepts"]}


def test_concepts_that_cannot_be_split_are_named():
    rows = [["cat", f"set{i}", "cat", "solid", False] for i in range(20)]
    noise = np.random.default_rng(0).normal(size=(20, 576)).astype(np.float32)
    unit = noise / np.linalg.norm(noise, axis=1, keepdims=True)
    with pytest.raises(ValueError, match="'cat' has 18 different drawings, 28 are held out"):
        icon_splits.choose(rows, unit, unit, ["cat"])


def test_a_split_keeps_copies_and_variants_out_of_pre_training_and_depends_on_the_drawings_alone():
    rng = np.random.default_rng(1)
    m = rng.normal(size=(80, 576)).astype(np.float32)
    m /= np.linalg.norm(m, axis=1, keepdims=True)
    rows = [["cat", f"set{i}", f"cat-{i}", "solid", i % 9 == 0] for i in range(80)]
    rows += [["lion", f"other{i}", "lion", "outline", False] for i in range(80)]  # each a copy of a cat
    m = np.concatenate([m, m])
    held = icon_splits.choose(rows, m, m, ["cat"])
    pre, figures = icon_splits.left_to_learn(rows, m, m, held)
    used = np.concatenate(list(held["cat"].values()))
    assert [len(held["cat"][s]) for s in ("shots", "val", "test")] == [16, 4, 8] and len(set(used)) == 28
    assert sum(rows[i][4] for i in used) == 7
    assert not set(used + 80) & set(pre["lion"]) and not set(used) & set(pre["cat"])
    assert figures["held out"] == figures["near copies left out"] == 28
    order = rng.permutation(160)
    again = icon_splits.choose([rows[i] for i in order], m[order], m[order], ["cat"])
    assert {s: {rows[order[i]][2] for i in ids} for s, ids in again["cat"].items()} == {
        s: {rows[i][2] for i in ids} for s, ids in held["cat"].items()
    }


def test_what_the_bundle_names_is_held_out_again_whatever_else_was_drawn():
    index, side = bundle.index(), bundle.SIDE
    ink = np.concatenate([bundle.drawings(s)[0] for s in bundle.SPLITS], 1).reshape(-1, side, side)
    names = [n for n in sorted(icon_names.choice()["concepts"], key=icon_names.prompt) for _ in range(bundle.HELD)]
    drawn = [d.split(":", 1) for row in index["drawings"] for d in row]
    rows = [[name, *d, "solid", False] for name, d in zip(names, drawn, strict=True)]
    rows += [["other", "set", f"other-{i}", "solid", False] for i in range(9)]
    order = np.random.default_rng(2).permutation(len(rows))
    rows, ink = [rows[i] for i in order], np.concatenate([ink, ink[:9]])[order]
    held = build_icons.written(rows)
    for split in bundle.SPLITS:
        again = np.stack([ink[held[n][split]] for n in dict.fromkeys(names)])
        assert np.array_equal(again, bundle.drawings(split)[0])
    with pytest.raises(ValueError, match=r"is held out and was not drawn: take @iconify/json 2\.2\.535, or --choose"):
        build_icons.written(rows[:100])


def test_a_pack_gives_back_what_it_was_given(tmp_path):
    ink = bundle.drawings("test")[0][0]
    colour = bundle.drawings("test")[1]
    colour = colour[colour[..., 3].any((2, 3))][:2]
    index = {"names": ["a", "b"], "concepts": ["a"], "sets": ["s"], "styles": ["solid"]}
    index |= {"name": [0] * 4 + [1] * 4, "set": [0] * 8, "style": [0] * 8, "eval": [0] * 4 + [-1] * 4}
    index |= {"colour_row": [0, 1] + [-1] * 6}
    icon_pack.save_pack(tmp_path, ink, colour, index)
    pack = icon_pack.load_pack(tmp_path)
    assert np.array_equal(pack["ink"], ink)
    assert pack["eval"].tolist() == index["eval"] and pack["names"] == ["a", "b"]
    again = icon_pack.rgba(pack, pack["colour_row"][:2])
    inked = colour[..., 3] > 200
    assert np.array_equal(again[..., 3] > 0, colour[..., 3] >= 96)
    assert np.abs(again[inked][:, :3].astype(int) - colour[inked][:, :3]).mean() < 16


# --------------------------------------------------------------------------------------------------------- the renderer


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
