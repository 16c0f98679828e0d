"""What is written down holds: README's snippet runs as printed, commands and files exist, configurations say theirs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from datasets import icon_scenes
from spotlighter_plugin import cli

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
    assert str(path.relative_to(ROOT)) in command or f"--hosts {path.parent.name} --config {path.stem}" in command
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
