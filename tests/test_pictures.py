"""A folder of one's own pictures: trained on, left as it was, and not needed to name what is on others."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from method_kit import random_clip, save_random_clip
from PIL import Image
from scenes_kit import class_folders
from towers_kit import HAS, transformers_model

from spotlighter_plugin import SpotlighterWrapper, cli
from spotlighter_plugin.workbench.photos.predict import predict
from spotlighter_plugin.workbench.photos.train import train
from spotlighter_plugin.workbench.training.saved import load_run
from spotlighter_plugin.workbench.training.settings import import_trainers_and_datasets

ROOT = Path(__file__).resolve().parent.parent
DOC = (ROOT / "docs/your_pictures.md").read_text(encoding="utf-8")
COLOURS = {"blue sky": 2, "red_rose": 0, "tree_frog": 1}
SMALL = ("TRAINER.SPOTLIGHTER.TOP_K", 6, "TRAINER.SPOTLIGHTER.SELECT_BLOCK", -1)  # for a tower of 16 tokens
QUICK = ("DATALOADER.NUM_WORKERS", 0, "TRAINER.COOP.N_CTX", 2, *SMALL)

import_trainers_and_datasets()

from datasets import pictures as own  # noqa: E402


def paint(folder, count=6, names=COLOURS):
    """A few noisy pictures a class."""
    noise = np.random.default_rng(0)
    for name, channel in names.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = noise.integers(0, 120, (20, 24, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with photos/, others/, a backbone, a run with Spotlighter and one without."""
    place = tmp_path_factory.mktemp("place")
    photos, backbone = paint(place / "photos"), save_random_clip(place / "clip.safetensors")
    paint(place / "others", 2)
    before = content(photos)
    for name, without in (("run", False), ("plain", True)):
        train(photos, "coop", 2, str(backbone), str(place / name), 1, without=without, options=QUICK)
    assert content(photos) == before  # nothing is written beside the user's pictures
    return place


@pytest.fixture
def call(capsys):
    """Calls the command and returns its exit code, what it said and what it complained of."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main(list(map(str, arguments)))
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    return call


@pytest.fixture
def refusal(call):
    """The one line that a command says of a mistake."""

    def refusal(*arguments):
        code, _, complaint = call(*arguments)
        (line,) = [line for line in complaint.splitlines() if line.startswith("error: ")]
        assert code == 1 and "Traceback" not in complaint
        return line

    return refusal


# -- the data set ----------------------------------------------------------------------------------------------


def loaded(root, shots=2, seed=1, part="all"):
    from types import SimpleNamespace as Node

    dataset = Node(ROOT=str(root), NUM_SHOTS=shots, SUBSAMPLE_CLASSES=part)
    return own.Pictures(Node(DATASET=dataset, SEED=seed, TRAINER=Node(NAME="CoOp")))


def paths(items):
    return {item.impath for item in items}


def test_splits_are_drawn_by_seed_share_no_picture_and_do_not_depend_on_the_shots(tmp_path):
    photos = paint(tmp_path / "photos", 10)
    one, same, other, more = loaded(photos), loaded(photos), loaded(photos, seed=2), loaded(photos, shots=0)
    assert paths(one.train_x) == paths(same.train_x) != paths(other.train_x)
    assert paths(one.test) == paths(more.test)
    assert [len(part) for part in (one.train_x, one.val, one.test)] == [6, 6, 6]
    assert [len(part) for part in (more.train_x, more.val, more.test)] == [18, 6, 6]
    assert not paths(more.train_x) & paths(more.val) | paths(more.val) & paths(more.test)
    assert not paths(more.train_x) & paths(more.test)


def test_a_class_is_called_as_its_folder_and_two_that_read_the_same_are_two(tmp_path):
    names = {"n01440764": 0, "tree frog": 1, "tree_frog": 2, ".hidden": 0}
    photos = loaded(paint(tmp_path / "photos", 4, names))
    assert photos.classnames == ["n01440764", "tree frog", "tree frog"] and photos.num_classes == 3
    assert {item.label for item in photos.test} == {0, 1, 2}


def test_train_val_and_test_are_taken_as_they_are_and_a_class_may_be_called_train(tmp_path):
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        paint(tmp_path / "photos" / part, count)
    photos = loaded(tmp_path / "photos", shots=0)
    for items, part, count in ((photos.train_x, "train", 9), (photos.val, "val", 6), (photos.test, "test", 3)):
        assert len(items) == count and all(Path(item.impath).parts[-3] == part for item in items)
    assert loaded(paint(tmp_path / "vehicles", 3, {"bus": 0, "train": 1})).classnames == ["bus", "train"]
    assert loaded(paint(tmp_path / "sets", 3, {"test": 0, "train": 1})).classnames == ["test", "train"]


def test_a_picture_that_cannot_be_read_is_no_shot(tmp_path, capsys):
    photos = paint(tmp_path / "photos", 2)
    (photos / "red_rose/0.png").write_text("no picture")
    (photos / "red_rose/1.png").write_text("no picture")
    for number in range(2, 6):
        shutil.copy(photos / "tree_frog/0.png", photos / f"red_rose/{number}.png")
    for seed in range(4):
        assert len([item for item in loaded(photos, shots=2, seed=seed).train_x if item.label == 1]) == 2
    assert "is no readable picture" in capsys.readouterr().out


# -- the commands ----------------------------------------------------------------------------------------------


def test_a_run_answers_without_its_pictures_wherever_it_was_moved(place, tmp_path, call):
    moved = tmp_path / "moved"
    shutil.copytree(place / "run", moved)
    settings = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(settings.replace(str(place / "photos"), "/gone"))
    answers = tmp_path / "answers.csv"
    code, said, _ = call("predict", moved, place / "others", "--top", 2, "--csv", answers)
    assert code == 0 and said.splitlines()[-1] == f"6 answers are in {answers}"
    rows = list(csv.DictReader(answers.open()))
    assert [row["picture"] for row in rows] == [str(path) for path in sorted(place.glob("others/*/*"))]
    for row, answer in zip(rows, predict(place / "run", [place / "others"], top=2), strict=True):
        assert [row["class_1"], row["class_2"]] == answer.names and "_" not in "".join(answer.names)
        assert float(row["probability_1"]) == pytest.approx(answer.probabilities[0], abs=1e-5)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_loaded_run_says_what_the_trained_one_said_and_so_does_what_save_pretrained_left(place):
    run, note = load_run(place / "run"), json.loads((place / "run/run.json").read_text())
    assert note["class_names"] == run.class_names == ["blue sky", "red rose", "tree frog"]
    assert run.wrapper.plugin.memory.is_ready
    images = torch.stack([run.read(path) for path in sorted(place.glob("others/*/*"))])
    with torch.no_grad():
        expected = run.wrapper(images)
        again = load_run(place / "run")
        host, adapter = again.wrapper.detach(), again.wrapper.adapter
        wrapper = SpotlighterWrapper.from_pretrained(place / "run/pretrained", host, adapter)
        assert torch.allclose(wrapper(images), expected, atol=1e-4)
    names, probabilities = run.wrapper.predict(images, top_k=3)
    for answer, mine, values in zip(predict(run, [place / "others"]), names, probabilities.tolist(), strict=True):
        assert answer.names == mine and answer.probabilities == pytest.approx(values, abs=1e-5)


def test_spotlighter_is_attached_to_what_was_trained_without_it_which_stays_as_it_was(place, tmp_path, call, refusal):
    before = content(place / "plain")
    assert load_run(place / "plain").wrapper is None
    attached = load_run(place / "plain", attach=True)
    assert attached.wrapper.plugin.memory.is_ready
    code, said, _ = call("predict", "--attach", place / "plain", place / "others", "--csv", tmp_path / "answers.csv")
    assert code == 0 and said.splitlines()[-1].startswith("6 answers are in ")
    assert content(place / "plain") == before
    assert "was trained with Spotlighter: leave --attach out" in refusal("predict", "--attach", place / "run", place)


def test_pictures_that_cannot_be_read_are_counted_and_named_and_the_others_answered(place, tmp_path, call, refusal):
    (tmp_path / "bad.png").write_text("no picture")
    shutil.copy(place / "others/tree_frog/0.png", tmp_path / "good.png")
    answers = tmp_path / "answers.csv"
    code, said, _ = call("predict", place / "run", tmp_path, "--csv", answers)
    assert code == 0 and "1 of 2 pictures cannot be read:" in said and f"{tmp_path / 'bad.png'} is no readable" in said
    bad, good = list(csv.reader(answers.open()))[1:]
    assert bad == [str(tmp_path / "bad.png"), *[""] * 6] and good[1]
    assert "none of the 1 pictures can be read" in refusal("predict", place / "run", tmp_path / "bad.png")


def test_train_says_where_the_run_is_and_what_to_type_next(place, tmp_path, call):
    flags = ("--backbone", place / "clip.safetensors", "--epochs", 1, "--shots", 2, "--output", tmp_path / "run")
    code, said, _ = call("train", place / "photos", *flags, "--", *QUICK)
    assert code == 0 and re.search(r"^[\d.]+ % of 3 other pictures are named right; the run is in ", said, re.M)
    assert said.splitlines()[-1] == f"next: spotlighter predict {tmp_path / 'run'} PICTURES"


def test_mistakes_are_one_line(place, tmp_path, refusal):
    photos, clip = place / "photos", place / "clip.safetensors"
    assert "nowhere: no such folder of pictures" in refusal("train", tmp_path / "nowhere")
    one = paint(tmp_path / "one", 2, {"rose": 0})
    assert "has one class only, 'rose'" in refusal("train", one)
    assert "has no class folders" in refusal("train", one / "rose")
    (one / "tulip").mkdir()
    assert "tulip has no picture" in refusal("train", one)
    for number in range(3):
        (one / f"tulip/{number}.png").write_text("no picture")
    line = refusal("train", one, "--backbone", clip, "--output", tmp_path / "failed")
    assert "class 'tulip': none of its 2 training pictures can be read" in line
    assert "--library timm: take open_clip or transformers" in refusal("train", photos, "--library", "timm")
    assert "--host Nobody: take one of CLIPFit, CoCoOp" in refusal("train", photos, "--host", "Nobody")
    assert "holds a finished run" in refusal("train", photos, "--output", place / "run")
    assert "nowhere: no such folder of a run" in refusal("predict", tmp_path / "nowhere", photos)
    assert "has no run.json" in refusal("predict", photos, photos)
    assert "nowhere.png: no such picture or folder" in refusal("predict", place / "run", tmp_path / "nowhere.png")
    (tmp_path / "empty").mkdir()
    assert "no picture in" in refusal("predict", place / "run", tmp_path / "empty")
    assert "there is no such folder" in refusal("predict", place / "run", photos, "--csv", tmp_path / "no/where.csv")


def test_a_run_of_another_backbone_is_refused_in_one_line(place, tmp_path, refusal):
    shutil.copytree(place / "run", tmp_path / "run")
    note = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(note | {"backbone_sha256": "0"}))
    assert "was trained on another backbone" in refusal("predict", tmp_path / "run", place / "others")
    (tmp_path / "run/run.json").write_text("{")
    assert "run.json is damaged" in refusal("predict", tmp_path / "run", place / "others")


# -- the documents ---------------------------------------------------------------------------------------------


def test_the_documents_ten_lines_of_python_answer_as_its_commands_do(tmp_path, monkeypatch, call, capsys):
    commands = re.findall(r"^    spotlighter (train .+|predict .+)", DOC, re.M)
    (snippet,) = re.findall(r"```python\n(.*?)```", DOC, re.S)
    assert len(snippet.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    class_folders("photos", drawings=6, scenes=1)
    class_folders("others", "test", drawings=2, scenes=1)
    assert len(commands) == 3
    for command in commands:
        more = ("--", "DATALOADER.NUM_WORKERS", 0) if command.startswith("train") else ()
        code, *_ = call(*command.replace("epochs 5", "epochs 1").split(), *more)
        assert code == 0
    rows = list(csv.reader(Path("answers.csv").read_text().splitlines()))[1:]
    right = sum(Path(row[0]).parts[-2] == row[1] for row in rows)
    assert len(rows) == 20 and right > 10
    shutil.rmtree("output")
    exec(snippet.replace("epochs=5", "epochs=1, options=('DATALOADER.NUM_WORKERS', 0)"), {})
    said = capsys.readouterr().out.splitlines()[-len(rows) :]
    assert said == [f"{row[0]}: {row[1]}, {float(row[2]):.0%}" for row in rows]


@pytest.mark.parametrize("library", ("open_clip", "transformers"))
def test_a_librarys_clip_is_trained_on_and_a_run_finds_it_again(place, tmp_path, call, library):
    if not HAS[library]:
        pytest.skip(f"{library} is not installed")
    if library == "open_clip":
        name = tmp_path / "weights.bin"
        torch.save(random_clip().state_dict(), name)
        name = f"{name}:gelu"
    else:
        name = tmp_path / "theirs"
        size = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
        transformers_model(text=size | {"eos_token_id": 49407}, vision=size).save_pretrained(name)
    flags = ("--library", library, "--backbone", name, "--epochs", 1, "--shots", 2, "--output", tmp_path / "run")
    code, said, _ = call("train", place / "photos", *flags, "--", *QUICK)
    assert code == 0
    note = json.loads((tmp_path / "run/run.json").read_text())
    assert note["backbone"] == f"{library}:{name}" and note["backbone_sha256"]
    run = load_run(tmp_path / "run")
    assert len(list(predict(run, [place / "others"]))) == 6
    hosts_gelu = type(run.trainer.model.host.image_encoder.transformer.resblocks[0].mlp.gelu).__name__
    assert hosts_gelu == ("GELU" if library == "open_clip" else "QuickGELU")


def test_the_tour_runs_as_it_is():
    cells = json.loads((ROOT / "docs/tour.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["wrapper"].plugin.memory.choice.describe()
