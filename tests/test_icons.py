"""The drawings of IconScenes: different ones on each side of the split, by sets whose licences allow it."""

from pathlib import Path

import numpy as np
import pytest

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
        icon_splits.split(rows, unit, unit, ["cat"])


def test_a_split_keeps_copies_and_variants_out_of_pre_training_and_depends_on_the_drawings_alone():
    rng = np.random.default_rng(1)
    m = rng.normal(size=(80, 576)).astype(np.float32)
    m /= np.linalg.norm(m, axis=1, keepdims=True)
    rows = [["cat", f"set{i}", f"cat-{i}", "solid", i % 9 == 0] for i in range(80)]
    rows += [["lion", f"other{i}", "lion", "outline", False] for i in range(80)]  # each a copy of a cat
    m = np.concatenate([m, m])
    held, pre, figures = icon_splits.split(rows, m, m, ["cat"])
    used = np.concatenate(list(held["cat"].values()))
    assert [len(held["cat"][s]) for s in ("shots", "val", "test")] == [16, 4, 8] and len(set(used)) == 28
    assert sum(rows[i][4] for i in used) == 7
    assert not set(used + 80) & set(pre["lion"]) and not set(used) & set(pre["cat"])
    assert figures["held out"] == figures["near copies left out"] == 28
    order = rng.permutation(160)
    again, _, _ = icon_splits.split([rows[i] for i in order], m[order], m[order], ["cat"])
    assert {s: {rows[order[i]][2] for i in ids} for s, ids in again["cat"].items()} == {
        s: {rows[i][2] for i in ids} for s, ids in held["cat"].items()
    }


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
