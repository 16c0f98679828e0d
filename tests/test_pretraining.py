"""The bundled towers' training: OpenAI's forward, losses that fall, captions that tell the truth, runs that go on."""

import itertools
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import icon_captions  # noqa: E402
import icon_pack  # noqa: E402
import pretrain_clip as tool  # noqa: E402

from datasets import icon_drawings, icon_render  # noqa: E402
from spotlighter_plugin.towers.clip import load_clip  # noqa: E402

CPU = torch.device("cpu")
NAMES, STYLES = ["airplane", "anchor", "apple", "birthday cake", "bread"], ["outline", "solid", "duotone", "palette"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pack of five names with three drawings each, of which the first two are the benchmark's concepts."""
    ink, colour = (a[:5, :3].reshape(-1, *a.shape[2:]) for a in icon_drawings.drawings("val"))
    coloured = colour[..., 3].any((1, 2)).nonzero()[0]
    row = np.full(15, -1)
    row[coloured] = np.arange(len(coloured))
    name = np.repeat(np.arange(5), 3)
    index = {
        "names": NAMES, "concepts": NAMES[:2], "sets": ["one"], "styles": STYLES, "name": name.tolist(),
        "set": [0] * 15, "style": [i % 4 for i in range(15)], "eval": np.where(name < 2, name, -1).tolist(),
        "colour_row": row.tolist(),
    }  # fmt: skip
    path = tmp_path_factory.mktemp("pack")
    icon_pack.save_pack(path, ink, colour[coloured], index)
    return path


@pytest.fixture
def pack(folder, monkeypatch):
    monkeypatch.setattr(tool, "POOL", 1000)
    torch.manual_seed(0)
    return icon_pack.load_pack(folder)


@pytest.fixture
def train(folder, tmp_path, monkeypatch):
    """A run of a dozen steps, by a clock that goes on when it is asked, watched on two concepts: the file it writes."""
    clock = SimpleNamespace(time=partial(next, itertools.count(0, 5)))
    for name, value in {"POOL": 1000, "CHUNK": 8, "time": clock}.items():
        monkeypatch.setattr(tool, name, value)
    monkeypatch.setattr(tool.icon_drawings, "concepts", lambda: NAMES[:2])
    few = {split: tuple(a[:2, :1] for a in icon_drawings.drawings(split)) for split in ("val", "test")}
    monkeypatch.setattr(tool.icon_drawings, "drawings", few.get)
    flags = {"pack": folder, "work": tmp_path / "work", "width": 64, "minutes": 3, "batch": 8, "device": "cpu",
             "text-scenes": 8, "text-steps": 2, "text-batch": 4, "check-every": 0}  # fmt: skip

    def run(name, **more):
        path, given = tmp_path / f"{name}.safetensors", {**flags, **more}
        parts = [str(part) for key, value in given.items() for part in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", ["", *parts, "--out", str(path)])
        tool.main()
        return path

    return run


def test_the_trainers_own_forward_is_openais():
    torch.manual_seed(0)
    model = tool.build(60, 2, 64).eval()
    images = torch.randint(256, (3, 3, 112, 112), dtype=torch.uint8)
    mean, std = (torch.tensor(a).view(1, 3, 1, 1) * 255 for a in (tool.MEAN, tool.STD))
    rows, end = torch.randint(1, 50, (3, 77)), torch.tensor([5, 9, 12])
    rows[torch.arange(3), end] = 59  # the largest, as OpenAI's end is
    with torch.no_grad():
        theirs = model.encode_image((images - mean) / std), model.encode_text(rows)
        every = torch.arange(196).expand(3, -1)
        ours = [tool.encode_image(model, images, patches, torch.float32) for patches in (None, every)]
        texts = tool.encode_text(model, rows[:, :13], end, torch.float32)
    for found in ours:
        assert torch.allclose(found, F.normalize(theirs[0], dim=-1), atol=1e-5)
    assert torch.allclose(texts, F.normalize(theirs[1], dim=-1), atol=1e-5)


def test_twice_the_blocks_see_the_same_at_first():
    torch.manual_seed(0)
    model = tool.build(60, 2, 64)
    big = tool.grow(model, 60, 64)
    images = torch.randint(256, (2, 3, 112, 112), dtype=torch.uint8)
    with torch.no_grad():
        few, many = (tool.encode_image(m, images, None, torch.float32) for m in (model, big))
    assert len(big.visual.transformer.resblocks) == 4 and torch.allclose(few, many, atol=1e-5)


def test_the_losses_fall_on_scenes_seen_again(pack):
    scenes, words = tool.Scenes(pack, CPU), icon_captions.Words(NAMES, STYLES, CPU)
    model, classifier = tool.build(len(words.ids), 2, 64), torch.nn.Linear(128, 5)
    images, main, scene, domain = scenes.batch(8, 0.1, "window", 6)
    patches, labels = tool.patches_of(scene, "window", 6), scenes.label[main]
    rows = words.captions(scenes, main, scene, domain, torch.arange(8))
    parameters = [*model.named_parameters(), *classifier.named_parameters("classifier")]
    optimizers, seen = tool.optimizers_of(parameters), []
    args = type("Args", (), {"lr": 2e-3, "muon_lr": 0.02})
    for _ in range(15):
        image = tool.encode_image(model, images, patches, torch.float32)
        text = tool.encode_text(model, *rows, torch.float32)
        losses = F.cross_entropy(classifier(16 * image), labels), tool.contrast(image, text, model.logit_scale)
        seen.append([loss.item() for loss in losses])
        tool.descend(sum(losses), parameters, optimizers, 0.0, 99, args)
    first, last = np.array(seen[0]), np.array(seen[-1])
    assert np.isfinite(last).all() and (last < 0.8 * first).all()


@pytest.mark.parametrize(("stage", "size"), [("window", 6), ("window", 8), ("part", 98)])
def test_a_stage_looks_at_as_many_patches_as_it_says_the_icon_among_them(pack, stage, size):
    _, _, scene, _ = tool.Scenes(pack, CPU).batch(40, 0.5, stage, size)
    patches = tool.patches_of(scene, stage, size)
    assert patches.shape == (40, size**2 if stage == "window" else size)
    assert all(len(set(row)) == len(row) and min(row) >= 0 and max(row) < 196 for row in patches.tolist())
    middle = (scene.top + scene.side // 2) // 8 * 14 + (scene.left + scene.side // 2) // 8
    seen = (patches == middle[:, None]).any(1).float().mean()
    assert seen == 1 if stage == "window" else seen > 0.5


@pytest.mark.parametrize("every_part", [False, True])
def test_a_caption_is_what_tokenizing_its_sentence_gives_and_says_what_is_drawn(pack, every_part, monkeypatch):
    scenes, words = tool.Scenes(pack, CPU), icon_captions.Words(NAMES, STYLES, CPU)
    _, main, scene, domain = scenes.batch(200, 0.5, "all", 196)
    chosen, rows_of = [], words._rows
    monkeypatch.setattr(words, "_rows", lambda phrases: chosen.append(phrases) or rows_of(phrases))
    some = torch.arange(0, 200, 2)
    rows, end = words.captions(scenes, main, scene, domain, some, every_part)
    texts = [" ".join(words.phrases[i] for i in row if words.phrases[i]) for row in chosen[0].tolist()]
    tokens = words.tokenize(texts)
    assert torch.equal(tokens.argmax(1), end)
    assert torch.equal(words.ids[rows], tokens[:, : rows.shape[1]]) and not tokens[:, rows.shape[1] :].any()
    for i, text in zip(some.tolist(), texts, strict=True):
        said = {key: [word for word in known if f" {word} " in f" {text} "] for key, known in {
            "name": NAMES, "size": icon_captions.SIZES, "style": STYLES, "ground": icon_render.GROUNDS,
            "domain": [word for word in icon_captions.ADJECTIVES.values() if word],
            "place": icon_captions.PLACES}.items()}  # fmt: skip
        assert said["name"] == [NAMES[scenes.label[main[i]]]]
        assert said["style"] in ([], [STYLES[scenes.style[main[i]]]])
        assert said["ground"] in ([], [icon_render.GROUNDS[scene.ground[i]]])
        adjective = icon_captions.ADJECTIVES[icon_render.DOMAINS[domain[i]]]
        assert said["domain"] in ([], [adjective])
        if every_part:
            parts = [said["size"], said["style"], said["ground"], said["place"]]
            assert sum(map(bool, parts)) >= 3
    assert len(set(texts)) > 50


def test_a_name_as_prompted_is_read_by_the_towers_as_it_was_in_training():
    words = icon_captions.Words(NAMES, STYLES, CPU)
    rows, end = words.prompts(NAMES, CPU)
    tokens = words.tokenize([f"a photo of a {name}." for name in NAMES])
    assert torch.equal(words.ids[rows], tokens[:, : rows.shape[1]]) and torch.equal(end, tokens.argmax(1))


def test_a_killed_run_goes_on_and_writes_a_clip_that_says_how_it_was_made(train, tmp_path, monkeypatch, capsys):
    save, saved = tool.save, []

    def killed(state, path):
        save(state, path)
        saved.append(state["spent"])
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(tool, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train("tower")
    monkeypatch.setattr(tool, "save", save)
    path = train("tower")
    assert f"resumed after {saved[-1] / 60:.1f} minutes" in capsys.readouterr().out
    clip = load_clip(str(path))
    assert len(clip.visual.transformer.resblocks) == 12 and clip.visual.input_resolution == 112
    with safetensors.safe_open(path, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
    recipe = metadata["recipe"]
    assert recipe["width"] == 64 and recipe["text_steps"] == 2 and recipe["scenes_seen"] == 8 * 9
    assert tuple(metadata["zero-shot on test drawings"]) == icon_render.DOMAINS

    student = load_clip(str(train("student", distil=path, work=tmp_path / "other")))
    theirs, own = clip.state_dict(), student.state_dict()
    changed = {name for name in theirs if not torch.equal(theirs[name], own[name])}
    assert "visual.proj" in changed and all(name.startswith("visual.") for name in changed)
