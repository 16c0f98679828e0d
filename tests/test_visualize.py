"""Pictures: what is lit is what was kept, files are whole or not there, mistakes are one line."""

import csv

import hosts_kit
import numpy as np
import pytest
import torch
from method_kit import CLASS_NAMES, save_random_clip, some_images, wrap
from PIL import Image

from spotlighter_plugin import cli
from spotlighter_plugin.workbench.pictures import figures, visualize
from spotlighter_plugin.workbench.pictures.curves import read_points
from spotlighter_plugin.workbench.reports.report import Cell, Table, as_csv
from spotlighter_plugin.workbench.training import train as training


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def backbone(tmp_path):
    return save_random_clip(tmp_path / "clip.safetensors")


def call(*flags):
    with pytest.raises(SystemExit) as end:
        cli.main(["visualize", *map(str, flags)])
    return end.value.code


def test_the_lit_patches_are_the_kept_tokens_with_the_better_half_as_level_1():
    wrapper, images = wrap(top_k=5).eval(), some_images(3)
    levels, logits = visualize.lit_levels(wrapper, images)
    assert levels.shape == (3, 4, 4) and logits.shape == (3, len(CLASS_NAMES))
    for level, kept in zip(levels.flatten(1), wrapper.kept, strict=True):
        assert level[kept].tolist() == [1, 1, 1, 2, 2]
        assert (level > 0).sum() == 5


@pytest.mark.parametrize("levels,number", [("1", 1), ("2", 2)])
def test_one_level_alone_is_drawn_as_that_level(levels, number):
    found, _ = visualize.lit_levels(wrap(top_k=6, levels=levels).eval(), some_images(2))
    assert found.unique().tolist() == [0, number] and (found > 0).sum(dim=(1, 2)).tolist() == [3, 3]


def test_dropped_patches_are_darker_and_kept_ones_are_not(monkeypatch):
    drawn = {}

    class Axes:
        imshow = staticmethod(lambda picture: drawn.update(picture=picture))
        add_patch = staticmethod(lambda patch: drawn.setdefault("corners", []).append(patch.get_xy()))

    level = torch.zeros(4, 4, dtype=torch.long)
    level[1, 2] = 1
    visualize._draw_lit(Axes, np.ones((32, 32, 3)), level)
    assert (drawn["picture"][8:16, 16:24] == 1).all() and drawn["picture"][:8].max() == pytest.approx(0.2)
    assert drawn["corners"] == [(15.5, 7.5)]


@pytest.mark.parametrize("suffix,start", [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_tokens_draws_images_of_any_backbone(picture, backbone, tmp_path, suffix, start):
    output = tmp_path / f"lit{suffix}"
    flags = ["--backbone", backbone, "--top-k", 6, "--class-names", "red,green", "--output", output]
    assert call("tokens", picture, picture, *flags) == 0
    assert output.read_bytes().startswith(start)
    assert not list(tmp_path.glob("*.part"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Output folders of a short run of CoOp and of one with Spotlighter, which train.py has left."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for trainer, module in (("CoOp", "coop"), ("CoOpSpotlighter", "coop_spotlighter")):
        own = folder / trainer
        own.mkdir()
        options = ["OPTIM.MAX_EPOCH", 1, "DATASET.SUBSAMPLE_CLASSES", "all"]
        options += ["TRAINER.SPOTLIGHTER.TOP_K", 6, "TRAINER.SPOTLIGHTER.PROTOTYPES", 2]
        made[trainer] = hosts_kit.make_trainer(own, trainer, module, *options)
        training._refuse_other_settings(made[trainer].cfg)  # writes config.yaml
        made[trainer].train()
    return {name: trainer.cfg.OUTPUT_DIR for name, trainer in made.items()} | {"trained": made}


def test_a_run_of_spotlighter_is_loaded_with_its_memory(runs):
    loaded, trained = visualize.load_run(runs["CoOpSpotlighter"]).model, runs["trained"]["CoOpSpotlighter"].model
    assert loaded.plugin.memory.is_ready and torch.equal(loaded.plugin.memory.means, trained.plugin.memory.means)
    assert torch.equal(loaded.host.prompt_learner.ctx, trained.host.prompt_learner.ctx)
    assert not loaded.training


def test_a_run_of_a_host_gets_spotlighter_around_it(runs):
    loaded = visualize.load_run(runs["CoOp"])
    assert type(loaded).__name__ == "CoOpSpotlighter"
    assert torch.equal(loaded.model.host.prompt_learner.ctx, runs["trained"]["CoOp"].model.prompt_learner.ctx)


def test_tokens_and_tsne_draw_a_run(runs, picture, tmp_path):
    run = runs["CoOpSpotlighter"]
    assert call("tokens", picture, "--run", run, "--output", tmp_path / "a.png") == 0
    assert call("tsne", "--run", run, "--classes", 4, "--images", 2, "--output", tmp_path / "b.svg") == 0
    assert (tmp_path / "a.png").stat().st_size > 1000
    drawn = (tmp_path / "b.svg").read_text()
    assert drawn.count("silhouette") == 2 or drawn.count('<g id="axes_') == 2


def test_embeddings_differ_only_by_the_tokens_left_out():
    images = some_images(4)
    every = visualize.embeddings(wrap(top_k=16).eval(), images)
    few = visualize.embeddings(wrap(top_k=4).eval(), images)
    assert torch.allclose(every["host"], every["Spotlighter"], atol=1e-5)
    assert not torch.allclose(few["host"], few["Spotlighter"], atol=1e-5)
    assert torch.allclose(few["Spotlighter"].norm(dim=-1), torch.ones(4))


def test_a_sample_takes_classes_evenly_and_the_first_images_of_each():
    items = [type("Item", (), {"label": label, "number": n}) for label in range(6) for n in range(4)]
    assert [(i.label, i.number) for i in visualize.sample(items, 3, 2)] == [
        (label, n) for label in (0, 2, 4) for n in (0, 1)
    ]


def test_curves_reads_what_ablate_and_report_write(tmp_path):
    ablation = Table(
        "figure4", 8, "k", ["Base", "HM"], [(f"top_k {k}", [Cell(k, 0.5), Cell(2 * k, 0)]) for k in (4, 8)]
    )
    few = Table("II", 6, "DTD", ["1-shot", "16-shot"], [("CoOp", [Cell(50), Cell(70)])])
    part = Table("II", 6, "Average", ["1-shot"], [("CoOp", [Cell(50, missing="1/11 sets")])])  # of a part: no curve
    (tmp_path / "a.csv").write_text(as_csv([ablation, few, part]))
    points = read_points(tmp_path / "a.csv")
    assert ("top_k", "Base", 4.0, 4.0, 0.5) in points and ("top_k", "HM", 8.0, 16.0, 0.0) in points
    assert [point[1:4] for point in points if point[0].startswith("shots")] == [
        ("CoOp", 1.0, 50.0),
        ("CoOp", 16.0, 70.0),
    ]


def test_curves_draws_named_columns_a_panel_each(tmp_path):
    with open(tmp_path / "sweep.csv", "w", newline="") as file:
        csv.writer(file).writerows([["alpha", "beta", "HM"], [0.1, "", 70], [0.2, "", 71], ["", 0.8, 72]])
    assert [point[:4] for point in read_points(tmp_path / "sweep.csv", "alpha,beta", "HM")] == [
        ("alpha", "HM", 0.1, 70.0), ("alpha", "HM", 0.2, 71.0), ("beta", "HM", 0.8, 72.0),
    ]  # fmt: skip
    (tmp_path / "bench.json").write_text('[{"top_k": 8, "images_per_second_spotlighter": 5, "host": "coop"}]')
    flags = ["--x", "top_k", "--y", "images_per_second_spotlighter", "--by", "host", "--log-x"]
    assert call("curves", tmp_path / "bench.json", *flags, "--output", tmp_path / "c.pdf") == 0
    assert call("curves", tmp_path / "sweep.csv", "--x", "alpha,beta", "--output", tmp_path / "c.png") == 0
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF")


def test_a_figure_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "old.png"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), figures.figure(path, 1, 1):
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["old.png"]


def bad_inputs(folder, picture, backbone):
    (folder / "broken.png").write_bytes(picture.read_bytes()[:200])
    (folder / "text.csv").write_text("a,b\n1,x\n")
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text("[1, 2]")
    lit = ["tokens", picture, "--backbone", backbone, "--top-k", 4]
    return [
        (["tokens", folder / "none.png", "--backbone", backbone, "--top-k", 4], "none.png: no such picture"),
        (["tokens", folder / "broken.png", "--backbone", backbone, "--top-k", 4], "broken.png is no readable picture"),
        (["tokens", picture, "--backbone", "RN5000"], "RN5000"),
        (["tokens", picture, "--backbone", backbone, "--top-k", 48], "TOP_K = 48"),
        (["tokens", picture, "--run", folder], "config.yaml"),
        ([*lit, "--activation", "sight"], "sight"),
        ([*lit, "--output", folder / "a.bmp"], ".bmp"),
        ([*lit, "--output", folder / "nowhere" / "a.png"], "does not exist"),
        (["tsne", "--classes", 1], "--classes is 1"),
        (["tsne", "--run", folder / "nowhere"], "no config.yaml"),
        (["curves", folder / "none.csv"], "none.csv: no such file"),
        (["curves", folder / "text.csv"], "--x and --y"),
        (["curves", folder / "text.csv", "--x", "c"], "no column 'c'"),
        (["curves", folder / "text.csv", "--x", "a", "--y", "b"], "'x' is no number"),
        (["curves", folder / "broken.json"], "neither CSV nor JSON"),
        (["curves", folder / "list.json"], "no rows"),
    ]


def test_bad_input_is_one_clear_line(tmp_path, picture, backbone, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, expected in bad_inputs(tmp_path, picture, backbone):
        assert call(*flags) == 1, flags
        error = capsys.readouterr().err.strip()
        assert expected in error and "\n" not in error, error
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "tokens.png").exists()
