"""`spotlighter evidence` on coloured squares: rows run once, are kept, and are printed without running again."""

import json
import shutil
from pathlib import Path

import method_kit
import numpy as np
import pytest
import torch
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from PIL import Image

from spotlighter_plugin.cli import main
from spotlighter_plugin.config import SpotlighterConfig
from spotlighter_plugin.method import memory
from spotlighter_plugin.workbench.evidence import command, guessed, hosts, plugin
from spotlighter_plugin.workbench.evidence.cell import Cell
from spotlighter_plugin.workbench.evidence.judge import Answers, Exam
from spotlighter_plugin.workbench.evidence.results import Key, Results
from spotlighter_plugin.workbench.evidence.tasks import FrozenTower, Scenes, configuration, load_task

NAMES = ("red", "green", "blue", "yellow", "dark grey", "sea shell")
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (70, 70, 70), (230, 220, 210))
COUNTS = {"train": 4, "val": 2, "test": 5}
SIZE = 64  # pixels: 64 patches


@DATASET_REGISTRY.register()
class Tiles(DatasetBase):
    """Noisy squares of a colour: 4 for training, 2 for validation and 5 for testing of each of 6 classes."""

    light = 1.0

    def __init__(self, cfg):
        folder = Path(cfg.DATASET.ROOT, type(self).__name__)
        shots = {**COUNTS, "train": min(COUNTS["train"], cfg.DATASET.NUM_SHOTS)}
        train, val, test = (self._items(folder, split, shots[split]) for split in COUNTS)
        super().__init__(train_x=train, val=val, test=test)

    def _items(self, folder, split, count):
        items = []
        for label, (name, colour) in enumerate(zip(NAMES, COLOURS, strict=True)):
            for number in range(count):
                path = folder / split / f"{label}-{number}.png"
                if not path.exists():
                    noise = np.random.default_rng([label, number, len(split)])
                    pixels = noise.normal(colour, 60, (SIZE, SIZE, 3)) * self.light
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
                items.append(Datum(str(path), label, 0, name))
        return items


@DATASET_REGISTRY.register()
class TilesDark(Tiles):
    light = 0.4


def write_family(folder, monkeypatch) -> list[str]:
    """Configuration files of Tiles and TilesDark on a random CLIP."""
    monkeypatch.setattr(method_kit, "SIZE", SIZE)
    weights = method_kit.save_random_clip(folder / "clip.safetensors", vision=64)
    files = []
    for name in ("Tiles", "TilesDark"):
        files.append(str(folder / f"{name}.yaml"))
        Path(files[-1]).write_text(
            f'DATASET:\n  NAME: "{name}"\n  NUM_SHOTS: 4\nMODEL:\n  BACKBONE:\n    NAME: "{weights}"\n'
            f'INPUT:\n  SIZE: ({SIZE}, {SIZE})\n  TRANSFORMS: ("normalize",)\n'
            'TRAINER:\n  COOP:\n    CTX_INIT: "a photo of a"\n'
        )
    return files


ACCURACIES = {"base", "new", "hm", "one_space_base", "one_space_new", "one_space_hm"}
KEYS = ACCURACIES | {"method", "dataset", "operations_ratio", "trained", "memory_mb", "seeds"}


@pytest.fixture
def family(tmp_path, monkeypatch):
    """Configuration files of two small data sets; rows are tuned over two settings and trained for a moment."""
    monkeypatch.setattr(hosts, "LENGTHS", (1,))
    monkeypatch.setattr(hosts, "SHORT", (1,))
    monkeypatch.setattr(hosts, "RATES", (0.01, 0.05))
    monkeypatch.setattr(command, "FOLDER", tmp_path / "kept")
    return write_family(tmp_path, monkeypatch)


def evidence(tmp_path, family, *flags):
    where = ["--results", str(tmp_path / "rows.npz"), "--json", str(tmp_path / "rows.json"), "--root", str(tmp_path)]
    try:
        main(["evidence", "--datasets", *family, "--seeds", "1", *where, *flags])
    except SystemExit as ended:
        return ended.code or 0
    return 0


def test_a_table_is_run_once_written_as_records_and_shown_again(tmp_path, family, capsys):
    names = ["zero-shot", "CoOp", "CoOp + cache", "CoOp + Gaussian classifier, open"]
    names += ["CoOp + Spotlighter, all tokens", "CoOp + Spotlighter"]
    assert evidence(tmp_path, family, "--rows", *names) == 0
    records = json.loads((tmp_path / "rows.json").read_text())
    accuracies = [record for record in records if "method" in record]
    own, moved = ([r for r in accuracies if ("trained_on" in r) == there] for there in (False, True))
    assert {(r["method"], r["dataset"]) for r in own} == {
        (name, dataset) for name in names for dataset in ("Tiles", "TilesDark", "average")
    }
    assert {(r["dataset"], r["trained_on"]) for r in moved} == {("TilesDark", "Tiles"), ("average", "Tiles")}
    assert all(set(record) - {"trained_on"} == KEYS for record in accuracies)
    assert all(0 <= record[name] <= 100 for record in accuracies for name in ACCURACIES)
    whole, spotlighter = (next(record for record in own if record["method"] == name) for name in names[-2:])
    assert 0 < spotlighter["operations_ratio"] < 1 and spotlighter["memory_mb"] == whole["memory_mb"] > 0
    assert 1 <= whole["operations_ratio"] < 1.2  # nothing is merged or cut
    differences = [record for record in records if "of" in record]
    assert {kind for r in differences for kind in r if kind.startswith("difference")} == {
        "difference", "difference_new", "difference_one_space",
    }  # fmt: skip
    assert all(r["of"] == names[-1] and r["low"] <= r["high"] for r in differences)

    printed = capsys.readouterr().out
    assert all(f"seed 1: {name}\n" in printed for name in names)
    written = (tmp_path / "rows.npz").stat().st_mtime_ns
    assert evidence(tmp_path, family, "--rows", *names) == 0  # nothing is missing
    assert evidence(tmp_path, family, "--show") == 0
    assert (tmp_path / "rows.npz").stat().st_mtime_ns == written
    printed = capsys.readouterr().out
    assert "seed 1:" not in printed and "Not there yet" in printed and "CoOp + Spotlighter, paper" in printed
    assert json.loads((tmp_path / "rows.json").read_text()) == records


def test_rows_of_other_settings_are_run_again_and_other_rows_stay(tmp_path, family, monkeypatch, capsys):
    assert evidence(tmp_path, family[:1], "--rows", "zero-shot", "CoOp") == 0
    monkeypatch.setattr(hosts, "RATES", (0.02, 0.05))
    capsys.readouterr()
    assert evidence(tmp_path, family[:1], "--rows", "zero-shot", "CoOp") == 0
    printed = capsys.readouterr().out
    assert "seed 1: CoOp\n" in printed and "seed 1: zero-shot\n" not in printed
    assert evidence(tmp_path, family[:1], "--rows", "zero-shot", "--again") == 0
    assert "seed 1: zero-shot\n" in capsys.readouterr().out


def test_without_their_own_training_data_sets_are_judged_by_what_the_first_taught(tmp_path, family):
    assert evidence(tmp_path, family, "--rows", "zero-shot", "CoOp", "--no-own") == 0
    records = json.loads((tmp_path / "rows.json").read_text())
    assert {(r["dataset"], r.get("trained_on")) for r in records if "method" in r} == {
        ("Tiles", None), ("TilesDark", "Tiles"), ("average", None), ("average", "Tiles"),
    }  # fmt: skip


def test_the_released_algorithm_and_the_papers_steps_learn_from_kept_states(tmp_path, family):
    names = ["CoOp + TextRefiner", "CoOp + Spotlighter, as released", "CoOp + Spotlighter, paper"]
    assert evidence(tmp_path, family[:1], "--rows", *names) == 0
    records = json.loads((tmp_path / "rows.json").read_text())
    trained = {r["method"]: r["trained"] for r in records if r.get("dataset") == "average"}
    assert set(trained) == set(names) and trained[names[0]] < trained[names[1]]  # the image branch is trained, too


def test_fewer_shots_are_rows_of_their_own(tmp_path, family):
    for shots in ("16", "2"):
        assert evidence(tmp_path, family[:1], "--rows", "CoOp + cache", "--shots", shots) == 0
    facts = Results(tmp_path / "rows.npz").facts
    kept = {key.shots: facts["memory_mb"] for key, facts in facts.items()}
    assert kept[16] == pytest.approx(2 * kept[2], rel=0.01)  # Tiles have 4


@pytest.mark.parametrize("host", ["MaPLe", "CLIPFit"])
def test_a_host_that_trains_its_tower_is_judged_by_what_its_own_tower_sees(tmp_path, family, monkeypatch, host):
    trainer, tries = hosts.TUNED[host.lower()]
    monkeypatch.setitem(hosts.TUNED, host.lower(), (trainer, ((0.5, 1, 12),)))
    names = [host, f"{host} + cache", f"{host} + Spotlighter", f"{host} + Spotlighter, trained together"]
    assert evidence(tmp_path, family[:1], "--host", host.lower(), "--rows", "zero-shot", *names) == 0
    records = json.loads((tmp_path / "rows.json").read_text())
    found = {record["method"]: record for record in records if record.get("dataset") == "average"}
    assert set(found) == {"zero-shot", *names}
    assert found[host]["trained"] > 1000 and found[names[2]]["memory_mb"] > 0
    kept = Results(tmp_path / "rows.npz")
    cell = Cell(
        hosts.kind_of(host.lower()), family[0], 1, str(tmp_path), task_of(tmp_path, family),
        FrozenTower(configuration(family[0], 1, str(tmp_path)), tmp_path), tmp_path / "kept",
    )  # fmt: skip
    fitted = cell.host[2]
    with torch.no_grad():
        logits = fitted.model(list(NAMES), "cpu")(cell.tower.pictures(cell.task.test.paths))
    right = (logits.argmax(1) == cell.task.test.labels).numpy()
    assert np.array_equal(right, kept.answers[Key(host, "Tiles", "Tiles", 1)].one)
    frozen = cell.tower.features(cell.task.test.paths)
    assert not torch.allclose(fitted.looks(cell.task.test, cell.tower), frozen, atol=1e-3)


def test_a_taught_student_files_pictures_of_all_classes_under_its_teachers_labels(tmp_path, family, monkeypatch):
    monkeypatch.setattr(hosts, "STUDENT", configuration(family[0], 1, str(tmp_path)).MODEL.BACKBONE.NAME)
    monkeypatch.setitem(hosts.TUNED, "promptkd", ("PromptKD", ((0.01, 1, 12),)))
    names = ["PromptKD", "PromptKD + cache", "PromptKD + Spotlighter"]
    assert evidence(tmp_path, family[:1], "--host", "promptkd", "--rows", *names) == 0
    found = {r["method"]: r for r in json.loads((tmp_path / "rows.json").read_text()) if r.get("dataset") == "average"}
    assert set(found) == set(names) and found[names[1]]["memory_mb"] > 0
    tower = FrozenTower(configuration(family[0], 1, str(tmp_path)), tmp_path)
    task = task_of(tmp_path, family)
    cell = Cell(hosts.kind_of("promptkd"), family[0], 1, str(tmp_path), task, tower, tmp_path / "kept")
    learned, host = cell.learned(cell.host[2], task), cell.host[2]
    assert learned.known == len(NAMES) and learned.shots.paths == task.shots.paths + task.others.paths
    with torch.no_grad():
        said = host.model(list(NAMES), "cpu").teacher(tower.pictures(learned.shots.paths)).argmax(1)
    assert torch.equal(learned.shots.labels, said)
    weights, attach, kept = [], guessed.attach, memory.GUESSED
    monkeypatch.setattr(guessed, "attach", lambda *given: weights.append(attach(*given).state) or attach(*given))
    found = guessed.sweep(cell, (0.0, 3.0))
    said = [next(v for name, v in state.items() if name.endswith("memory.weight")).tolist() for state in weights]
    assert said == [pytest.approx([memory.UNJUDGED, weight]) for weight in found] and kept == memory.GUESSED


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rows", "CoOp + magic"], "--rows CoOp + magic: no such row"),
        (["--host", "magic"], "--host magic: take one of coop"),
        (["--show"], "no finished rows are kept there"),
    ],
)
def test_mistakes_are_one_line(tmp_path, family, capsys, flags, said):
    assert evidence(tmp_path, family, *flags) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def task_of(tmp_path, family):
    return load_task(configuration(family[0], 1, str(tmp_path)))


def test_a_miniature_is_made_of_base_classes_and_their_validation_pictures_alone(tmp_path, family):
    task = task_of(tmp_path, family)
    small = task.miniature()
    assert (task.names, task.known) == (list(NAMES), 3) and (small.names, small.known) == (list(NAMES[:3]), 2)
    assert small.test.paths == task.held_out.paths and set(small.shots.labels.tolist()) == {0, 1}
    assert set(small.others.labels.tolist()) == {2} and set(task.others.labels.tolist()) == {3, 4, 5}
    looked_at = {*small.shots.paths, *small.others.paths, *small.test.paths}
    assert not looked_at & {*task.test.paths, *task.others.paths}


def test_features_are_kept_by_what_a_picture_holds(tmp_path, family, monkeypatch):
    task, cfg = task_of(tmp_path, family), configuration(family[0], 1, str(tmp_path))
    tower = FrozenTower(cfg, tmp_path / "kept")
    first = tower.features(task.test.paths)
    with torch.no_grad():
        seen = tower.vision(tower.pictures(task.test.paths))
    assert torch.allclose(first, seen / seen.norm(dim=-1, keepdim=True), atol=1e-5)

    again, asked = FrozenTower(cfg, tmp_path / "kept"), []
    monkeypatch.setattr(again, "pictures", lambda paths: asked.append(paths) or tower.pictures(paths))
    assert torch.equal(again.features(task.test.paths), first) and not asked
    moved = shutil.copy(task.test.paths[0], tmp_path / "moved.png")
    assert torch.equal(again.features([str(moved)]), first[:1]) and not asked
    again.features(task.shots.paths[:2])
    assert asked == [task.shots.paths[:2]]


@pytest.mark.parametrize(
    ("host", "options"), [("coop", {}), ("coop", {"merge": 4, "top_k": 24}), ("kgcoop", {}), ("maple", {})]
)
def test_spotlighter_on_kept_states_answers_as_on_pictures(tmp_path, family, monkeypatch, host, options):
    monkeypatch.setitem(hosts.TUNED, "maple", ("MaPLe", ((0.5, 1, 12),)))
    cell = Cell(hosts.kind_of(host),
        family[0], 1, str(tmp_path), task_of(tmp_path, family),
        FrozenTower(configuration(family[0], 1, str(tmp_path)), tmp_path), tmp_path,
    )  # fmt: skip
    task, tower = cell.task, cell.tower
    attached = plugin.attach(cell.host[2], SpotlighterConfig(**options), task, task, tower)
    answers = attached.answers(task.test, tower)
    is_base = (task.test.labels < task.known).numpy()
    for names, mine, low, right in (
        (task.names, slice(None), 0, answers.one),
        (task.names[:3], is_base, 0, answers.own[is_base]),
        (task.names[3:], ~is_base, 3, answers.own[~is_base]),
    ):
        paths, labels = np.array(task.test.paths)[mine].tolist(), task.test.labels[mine] - low
        with torch.no_grad():
            logits = attached.wrapper(names, tower.device)(tower.pictures(paths))
        assert ((logits.argmax(1) == labels).numpy() == right).mean() > 0.9


def some_rows(n=11, seed=0):
    rng = np.random.default_rng(seed)
    return Answers(rng.random(n) < 0.5, rng.random(n) < 0.5), Exam(np.arange(n) % 4, 2)


def test_finished_rows_come_back_as_they_were_kept(tmp_path):
    kept, (answers, exam) = Results(tmp_path / "rows.npz"), some_rows()
    key, facts = Key("CoOp", "Tiles", "Tiles", 1), {"trained": 5, "chosen": {"rate": 0.1}, "made": "so"}
    kept.put({key: (facts, answers, exam)})
    again = Results(tmp_path / "rows.npz")
    assert again.facts == {key: facts} and again.exams["Tiles"].known == 2
    assert np.array_equal(again.answers[key].own, answers.own) and np.array_equal(again.answers[key].one, answers.one)
    assert np.array_equal(again.exams["Tiles"].labels, exam.labels)


def test_two_processes_add_rows_to_one_file(tmp_path):
    first, second = Results(tmp_path / "rows.npz"), Results(tmp_path / "rows.npz")
    keys = [Key(name, "Tiles", "Tiles", 1) for name in ("CoOp", "zero-shot")]
    for results, key in zip((first, second), keys, strict=True):
        results.put({key: ({"made": ""}, *some_rows())})
    assert set(Results(tmp_path / "rows.npz").facts) == set(keys)


def test_rows_judged_on_other_pictures_are_forgotten(tmp_path):
    kept = Results(tmp_path / "rows.npz")
    keys = [Key(name, "Tiles", "Tiles", 1) for name in ("CoOp", "zero-shot")]
    kept.put({keys[0]: ({"made": ""}, *some_rows(11))})
    kept.put({keys[1]: ({"made": ""}, *some_rows(12))})
    assert set(kept.facts) == {keys[1]}


def test_scenes_of_some_classes_keep_their_labels():
    some = Scenes(["a", "b", "c"], torch.tensor([0, 2, 1])).of_classes(1, 3)
    assert some.paths == ["b", "c"] and some.labels.tolist() == [2, 1]
