"""What is written down holds: README's snippet runs as printed, commands and files exist, configurations say theirs."""

import re
import subprocess
import sys
from pathlib import Path

import clip
import pytest
import torch
from clip.clip import _transform
from clip.model import CLIP
from hosts_kit import make_trainer
from method_kit import CLASS_NAMES, SIZE, random_clip
from PIL import Image

from datasets import icon_scenes
from spotlighter_plugin import SpotlighterWrapper, cli
from spotlighter_plugin.hosts import HostAdapter, adapter_for
from spotlighter_plugin.hosts.clip_model import CLIPModelAdapter

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def drawn(folder, snippet):
    """What `make demo` leaves in data/ of the classes that the snippet names."""
    names = re.findall(r'"([^"]+)"', re.search(r"^names = \[(.+)\]", snippet, re.M)[1])
    data = icon_scenes.IconScenes.__new__(icon_scenes.IconScenes)
    data.names, data.dataset_dir = icon_scenes.concepts(), folder / "data/icon_scenes"
    labels, few = [data.names.index(name) for name in names], {"train": 8, "val": 4, "test": 2}
    data._write([(split, label, drawing, 0) for split in few for label in labels for drawing in range(few[split])])


def test_the_snippet_runs_as_printed_and_classifies_a_picture(tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    drawn(tmp_path, snippet)
    (tmp_path / "snippet.py").write_text(snippet, encoding="utf-8")
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "snippet.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    truth, found = re.fullmatch(r"a picture of (.+): (.+), \d+%\n", done.stdout).groups()
    assert found == truth


def test_it_fits_a_few_screens():
    assert len(README.splitlines()) <= 140


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text):
        assert not link or (path.parent / link).exists(), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"(?:^    |`)spotlighter ([a-z]+)", text, re.M):
        assert name in {*cli.COMMANDS, "demo", "doctor"}, name
    if "findings" not in path.parts:  # those name the commit that has their tools
        for tool in re.findall(r"python (tools/\w+\.py)", text):
            assert (ROOT / tool).is_file(), tool


CONFIGURATIONS = sorted(ROOT.glob("configs/**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_configuration_says_its_command_how_long_it_takes_and_what_to_expect(path):
    head = path.read_text(encoding="utf-8")
    said = {word: re.search(rf"^# {word}: +(.+)", head, re.M)[1] for word in ("Command", "Duration", "Expected")}
    command, expected = said["Command"], said["Expected"]
    host, config = path.parent.name, path.stem
    named = re.search(rf"--hosts {host}( {host}Spotlighter)? --config {re.escape(config)}\b", command)
    assert named or str(path.relative_to(ROOT)) in command
    assert re.search(r"\d\d|no figure|FIGURES", expected)


def test_every_function_that_the_equations_name_is_where_they_say():
    text = (ROOT / "docs/equations.md").read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+\.py): ([\w., ]+)`", text)
    assert len(places) > 15
    for file, names in places:
        (source,) = [path for path in (ROOT / "spotlighter_plugin").rglob("*.py") if f"/{path}".endswith(f"/{file}")]
        for name in names.split(", "):
            for part in name.split("."):
                assert re.search(rf"^\s*(def|class) {part}\b", source.read_text(encoding="utf-8"), re.M), (file, name)


# ------------------------------------------------------------------------------------------------ docs/your_own_host.md


DOC = Path(__file__).parent.parent / "docs/your_own_host.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)
ALL = SIZE // 8 * (SIZE // 8)  # every token


@pytest.fixture
def folder_of_photos(tmp_path, monkeypatch):
    """A random CLIP of 64 tokens in clip.load's place, and six photos in the working folder."""
    torch.manual_seed(0)
    model = CLIP(64, 64, 2, 64, 8, 77, 49408, 64, 1, 2).eval()
    monkeypatch.setattr(clip, "load", lambda name, device: (model, _transform(64)))
    monkeypatch.chdir(tmp_path)
    for name, number in ((n, i) for n in ("blue", "red") for i in range(3)):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 64 + number), name).save(tmp_path / "photos" / name / f"{number}.png")
    return model


def test_the_three_lines_of_the_document_classify(folder_of_photos):
    names = {}
    exec(EXAMPLES[0], names)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert names["wrapper"](images).shape == (2, 3)
        assert names["wrapper"].kept.shape == (2, 32)
        shots = names["few_shots"] = [(torch.randn(6, 3, 64, 64), torch.arange(6) % 3)]
        exec(EXAMPLES[1], names)
        names["wrapper"].plugin.memory.weight.fill_(1e3)  # texts are random
        names["wrapper"].refresh()
        assert names["wrapper"](shots[0][0]).argmax(1).tolist() == shots[0][1].tolist()
        exec(EXAMPLES[2], names)
        assert names["wrapper"](images).shape == (2, 3)


def test_the_documents_own_adapter_trains_its_host_and_the_plugin(folder_of_photos):
    names = {}
    exec(EXAMPLES[3], names)
    wrapper, host = names["wrapper"], names["host"]
    texts = clip.tokenize(["a photo of a blue.", "a photo of a red."])
    assert not torch.equal(host.text, folder_of_photos.encode_text(texts))
    wrapper.load_state_dict(torch.load("spotlighter.pt"))


def test_the_complete_example_has_at_most_forty_lines():
    assert len(EXAMPLES[3].splitlines()) <= 40


def test_another_template_gives_other_texts():
    model = random_clip()
    photo, sketch = (CLIPModelAdapter(model, ["frog"], template=t) for t in ("a photo of a {}.", "a sketch of a {}."))
    assert not torch.equal(photo.encode_text(), sketch.encode_text())


def test_a_plain_clip_without_class_names_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^a plain CLIP knows no classes: pass class_names=\[...\]$"):
        SpotlighterWrapper(random_clip())


def test_an_adapter_of_ones_own_keeps_the_others_from_nothing():
    class Mine(HostAdapter):
        pass

    assert isinstance(adapter_for(random_clip(), CLASS_NAMES), CLIPModelAdapter)
    with pytest.raises(ValueError, match="no adapter recognises a Linear; pass adapter=…"):
        adapter_for(torch.nn.Linear(2, 2))


def test_the_documents_trainer_of_twenty_lines_trains(tmp_path):
    names = {}
    exec(EXAMPLES[4], names)
    assert len([line for line in EXAMPLES[4].splitlines() if line]) <= 20
    options = ("TRAINER.COOP.PREC", "fp32", "TRAINER.SPOTLIGHTER.TOP_K", 6)
    trainer = make_trainer(tmp_path, "NearSpotlighter", "coop", *options)
    before = trainer.spotlighter.host.prompt_learner.ctx.clone()
    trainer.train()
    assert not torch.equal(before, trainer.spotlighter.host.prompt_learner.ctx)
    assert trainer.spotlighter.plugin.memory.is_ready
