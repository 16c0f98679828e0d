"""Sweeps: what is planned, and how killed, failing and finished runs are treated; train.py is a stand-in."""

import io
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_home
import pytest
import yaml
from dassl.config import get_cfg_default
from rich.console import Console
from scenes_kit import fewer_scenes
from yacs.config import CfgNode

from spotlighter_plugin import cli
from spotlighter_plugin.config import extend_cfg, from_cfg
from spotlighter_plugin.workbench.pictures.curves import read_points
from spotlighter_plugin.workbench.reports.report import as_csv, make_tables
from spotlighter_plugin.workbench.reports.results import find_results
from spotlighter_plugin.workbench.sweeps import launch
from spotlighter_plugin.workbench.sweeps.ablate import ABLATIONS, Ablation
from spotlighter_plugin.workbench.sweeps.plan import ELEVEN, ICONS, VARIANTS, Plan
from spotlighter_plugin.workbench.sweeps.sweep import sweep
from spotlighter_plugin.workbench.training.runs import progress, read_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def home(tmp_path):
    return fake_home.make(tmp_path / "home")


def plan(home, protocol="base2new", hosts=("CoOp",), datasets=("dtd",), seeds=(1,), options=(), **more):
    return Plan(protocol, hosts, datasets, seeds, output=str(home / "output"), options=options, home=home, **more)


def run(a_plan, **how):
    console = Console(file=io.StringIO(), width=200)
    return sweep(a_plan, console=console, **how), console.file.getvalue()


def relative(chains, home):
    return [[str(each.folder.relative_to(home / "output")) for each in chain] for chain in chains]


def test_base2new_has_the_folders_of_upstreams_scripts(home):
    assert relative(plan(home).chains(), home) == [
        [
            "base2new/train_base/dtd/shots_16/CoOp/default/seed1",
            "base2new/test_new/dtd/shots_16/CoOp/default/seed1",
        ]
    ]


def test_the_other_protocols_have_the_folders_of_upstreams_scripts(home):
    chains = plan(home, "crossdomain", datasets=("imagenet_a", "dtd"), config="vit_b16").chains()
    assert relative(chains, home) == [
        [
            "imagenet/CoOp/vit_b16_16shots/seed1",
            "evaluation/CoOp/vit_b16_16shots/imagenet_a/seed1",
            "evaluation/CoOp/vit_b16_16shots/dtd/seed1",
        ]
    ]
    few = relative(plan(home, "fewshot", shots=(1, 16)).chains(), home)
    assert few == [["dtd/CoOp/default_1shots/seed1"], ["dtd/CoOp/default_16shots/seed1"]]


def test_the_new_classes_are_tested_with_the_last_epoch_of_the_base_model(home):
    train, test = plan(home).chains()[0]
    (train.folder / "prompt_learner").mkdir(parents=True)
    for epoch in (5, 50, 10):
        (train.folder / f"prompt_learner/model.pth.tar-{epoch}").touch()
    text = " ".join(test.arguments)
    assert f"--eval-only --model-dir {train.folder} --load-epoch 50" in text
    assert "DATASET.SUBSAMPLE_CLASSES new" in text and "DATASET.SUBSAMPLE_CLASSES base" in " ".join(train.arguments)
    (train.folder / "prompt_learner/model-best.pth.tar").touch()
    assert "--load-epoch" not in test.arguments


def test_zero_shot_clip_is_only_evaluated(home):
    for chain in plan(home, hosts=("zeroshotclip",)).chains():
        assert all("--eval-only" in each.arguments and "--model-dir" not in each.arguments for each in chain)


def test_promptkd_trains_once_for_both_halves_and_anew_for_each_target(home):
    (chain,) = plan(home, hosts=("PromptKD",)).chains()
    assert len(chain) == 1 and "TRAINER.MODAL base2novel" in " ".join(chain[0].arguments)
    assert "shots_0" in str(chain[0].folder)
    chains = plan(home, "crossdataset", hosts=("PromptKD",), datasets=("dtd", "caltech101")).chains()
    for chain in chains:
        assert "DATASET.NUM_SHOTS 0 TRAINER.MODAL cross" in " ".join(chain[0].arguments)


def test_every_data_set_that_a_protocol_names_has_a_config():
    for protocol, count in (("base2new", 11), ("crossdomain", 1), ("crossdataset", 1)):
        assert len(Plan(protocol, ("CoOp",), seeds=(1,)).chains()) == count
    assert len(Plan("base2new", ("CoOp",), ("icons",), seeds=(1,)).chains()) == len(ICONS)
    assert len(Plan("crossdomain", ("CoOp",), seeds=(1,)).chains()[0]) == 1 + len(VARIANTS)
    assert len(Plan("crossdataset", ("CoOp",), seeds=(1,)).chains()[0]) == len(ELEVEN)


def test_the_files_of_a_host_serve_its_spotlighter_where_that_has_none_of_the_name(home):
    def file_of(config):
        (run, *_), *_ = plan(home, hosts=("CoOpSpotlighter",), config=config).chains()
        return run.flags[run.flags.index("--config-file") + 1]

    assert file_of("vit_b16") == "configs/trainers/CoOp/vit_b16.yaml"
    assert file_of("default") == "configs/trainers/CoOpSpotlighter/default.yaml"
    (home / "configs/trainers/CoOpSpotlighter/vit_b16.yaml").write_text("")
    assert file_of("vit_b16") == "configs/trainers/CoOpSpotlighter/vit_b16.yaml"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"protocol": "base2old"}, "unknown protocol 'base2old': take base2new"),
        ({"hosts": ("CoCoOp",)}, "unknown host 'CoCoOp': configs/trainers has CoOp, "),
        ({"datasets": ("mnist",)}, "unknown data set 'mnist': take eleven, "),
        ({"config": "rn50"}, "--config rn50: CoOp has default, vit_b16"),
        ({"options": ("OPTIM.LR",)}, "'OPTIM.LR' stands alone"),
        ({"shots": (1, 2)}, "base2new takes one --shots, got 1, 2"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(home, change, says):
    with pytest.raises(ValueError) as caught:
        plan(home, **change).chains()
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_launcher_and_no_jobs_are_one_line(home):
    with pytest.raises(ValueError, match="unknown launcher 'pbs': take here, cached, slurm, ray"):
        run(plan(home), launcher="pbs")
    with pytest.raises(ValueError, match="--jobs is 0, must be at least 1"):
        run(plan(home), jobs=0)


@pytest.mark.parametrize("launcher", ["slurm", "ray"])
def test_a_launcher_whose_library_is_missing_is_one_line(home, launcher, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=f"--launcher {launcher} needs .*: pip install"):
        run(plan(home), launcher=launcher)


def test_complete_runs_are_skipped(home):
    failures, said = run(plan(home))
    assert failures == [] and "2 runs, 0 of them complete" in said and "2 of 2 runs are complete" in said
    before = {path: path.stat().st_mtime_ns for path in (home / "output").rglob("log.txt*")}
    failures, said = run(plan(home))
    assert failures == [] and "2 runs, 2 of them complete" in said
    assert {path: path.stat().st_mtime_ns for path in (home / "output").rglob("log.txt*")} == before


def test_an_option_that_overrides_the_plans_own_is_the_one_that_a_complete_run_is_held_to(home):
    fewer = ("DATASET.NUM_SHOTS", "4")
    assert run(plan(home, options=fewer))[0] == run(plan(home, options=fewer))[0] == []
    (failure, _) = run(plan(home))[0]
    assert "holds a complete run with DATASET.NUM_SHOTS 4, not 16" in failure


def test_a_half_done_run_continues_from_its_checkpoint(home):
    run(plan(home))
    train = plan(home).chains()[0][0].folder
    whole = read_run(train).accuracy
    (train / "log.txt").write_text("".join((train / "log.txt").read_text().partition("epoch [2/3]")[:2]))
    (train / "prompt_learner/model.pth.tar-3").unlink()
    assert not read_run(train).complete and progress(train) == pytest.approx(1 / 3 + 1 / 3)
    assert run(plan(home))[0] == []
    continued = (train / "log.txt-2026-01-01-00-00-01").read_text()
    assert "epoch [3/3]" in continued and "epoch [2/3]" not in continued
    assert read_run(train).accuracy == whole


def test_a_run_killed_between_its_result_and_what_it_keeps_is_gone_on_with(home):
    run(plan(home))
    train, test = plan(home).chains()[0]
    assert train.complete and test.complete
    for each in (train, test):
        (each.folder / "config.yaml").touch()  # as this repository's train.py does at first
    assert not train.complete and test.complete  # an evaluation keeps nothing
    (train.folder / "run.json").touch()  # and at last
    assert train.complete


def test_a_failing_run_is_survived_and_reported_at_the_end(home):
    failures, said = run(plan(home, hosts=("CoOp", "CoOpSpotlighter"), options=("TRAINER.FAIL", "CoOp")))
    assert len(failures) == 1 and "2 of 4 runs are complete, 1 failed" in said
    assert failures[0].startswith("CoOp dtd base seed 1: no such thing as luck (")
    assert failures[0] in said.replace("\n", "").rpartition("1 failed")[2]


def test_a_complete_run_of_other_options_is_not_passed_off_as_this_one(home):
    run(plan(home, options=("OPTIM.LR", "0.1")))
    failures, _ = run(plan(home, options=("OPTIM.LR", "0.10")))
    assert failures == []
    failures, _ = run(plan(home, options=("OPTIM.LR", "0.2")))
    assert len(failures) == 2 and "holds a complete run with OPTIM.LR 0.1, not 0.2" in failures[0]


def test_jobs_run_at_once(home):
    meeting = plan(home, "fewshot", shots=(1, 2, 4), options=("TRAINER.MEET", "3"))  # each waits for the others
    assert run(meeting, jobs=3)[0] == []


def test_a_run_that_another_sweep_has_begun_is_waited_for(home):
    chain = plan(home).chains()[0]
    chain[0].folder.mkdir(parents=True)
    holder = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True);"
        "time.sleep(1)"
    )
    other = subprocess.Popen([sys.executable, "-c", holder, chain[0].folder / ".lock"], stdout=subprocess.PIPE)
    other.stdout.readline()
    assert launch.run_chain(chain, home) == ""
    assert other.poll() is not None


def test_a_sweep_killed_at_a_random_moment_and_started_again_ends_with_the_same_report(home):
    def report():
        return as_csv(make_tables(find_results([home / "output"])))

    def whole(protocol, *options):
        return plan(home, protocol, ("CoOp", "CoOpSpotlighter"), seeds=(1, 2, 3), shots=(16,), options=options)

    def start(protocol):
        def work():
            os.setsid()
            sys.exit(len(run(whole(protocol, "TRAINER.SLEEP", "0.25"), jobs=3)[0]))

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        return process

    for protocol in ("base2new", "fewshot"):
        assert run(whole(protocol), jobs=3)[0] == []
    expected = report()
    shutil.rmtree(home / "output")
    marks = {"base2new": "train_base/*/*/*/*/seed?/log.txt", "fewshot": "default_16shots/seed?/log.txt"}
    for protocol, mark in marks.items():
        first = start(protocol)
        while first.is_alive() and not any((home / "output").rglob(mark)):
            time.sleep(0.02)
        time.sleep(random.uniform(0, 1))
        assert first.is_alive()
        kill = os.kill if protocol == "base2new" else os.killpg  # leaving its train.py as orphans, or not
        kill(first.pid, signal.SIGKILL)
        first.join()
        again = start(protocol)
        again.join(300)
        assert again.exitcode == 0
    assert report() == expected


TINY = ("OPTIM.MAX_EPOCH", "2", "TRAIN.CHECKPOINT_FREQ", "1", "TRAINER.COOP.CTX_INIT", "a photo of a")
TINY += ("DATALOADER.TRAIN_X.BATCH_SIZE", "4", "TRAINER.SPOTLIGHTER.TOP_K", "8")


def real(folder, protocol, hosts=("CoOp", "CoOpSpotlighter"), seeds=(1, 2, 3), options=TINY, **more):
    data, output = str(folder / "data"), str(folder / "output")
    return Plan(protocol, hosts, ("icon_scenes",), seeds, (2,), "", data, output, options=options, **more)


def sweep_both(folder):
    """2 hosts x 2 protocols x 3 seeds, trained for real; returns the failures."""
    return [failure for p in ("base2new", "fewshot") for failure in run(real(folder, p), launcher="cached")[0]]


def test_real_training_killed_at_a_random_moment_and_started_again_ends_with_the_same_report(tmp_path, monkeypatch):
    fewer_scenes(monkeypatch)
    assert sweep_both(tmp_path) == []
    before = as_csv(make_tables(find_results([tmp_path / "output"])))
    shutil.rmtree(tmp_path / "output")
    chains = [chain for p in ("base2new", "fewshot") for chain in real(tmp_path, p).chains()]
    runs = [each for chain in chains for each in chain]
    assert len(runs) == 2 * (2 + 1) * 3
    script = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[2]); import conftest, scenes_kit, test_sweep;"
        "vars(scenes_kit.icon_scenes).update(scenes_kit.few()); test_sweep.sweep_both(pathlib.Path(sys.argv[1]))"
    )
    first = subprocess.Popen([sys.executable, "-c", script, tmp_path, os.path.dirname(__file__)])
    begun = random.choice(runs[:-2]).folder
    while first.poll() is None and not list(begun.glob("log.txt")):
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.5))
    assert first.poll() is None
    first.kill()
    first.wait()
    assert not runs[-1].complete
    assert sweep_both(tmp_path) == []
    assert as_csv(make_tables(find_results([tmp_path / "output"]))) == before


@pytest.mark.parametrize("host", ["MaPLe", "MaPLeSpotlighter", "CLIPFit"])
def test_a_run_that_trains_below_the_cached_states_fails_in_one_line(tmp_path, monkeypatch, host):
    fewer_scenes(monkeypatch)
    failures, _ = run(real(tmp_path, "fewshot", (host,), (1,), TINY[:2]), launcher="cached")
    assert len(failures) == 1 and "trains blocks before " in failures[0]


def test_augmented_images_are_not_cached(tmp_path):
    augmented = (*TINY, "INPUT.TRANSFORMS", "('random_flip', 'normalize')")
    failures, _ = run(real(tmp_path, "fewshot", ("CoOp",), (1,), augmented), launcher="cached")
    assert len(failures) == 1 and "states of augmented images cannot be kept" in failures[0]


def test_cached_states_are_for_one_run_at_a_time_of_this_repository(home):
    for wrong in ({"jobs": 2}, {}):
        with pytest.raises(ValueError, match="--launcher cached runs this repository's train.py, one run at a time"):
            run(plan(home), launcher="cached", **wrong)


def test_validation_stays_inside_the_base_classes_and_apart_from_the_data_sets_own_figures(tmp_path, monkeypatch):
    fewer_scenes(monkeypatch)
    chosen = real(tmp_path, "base2new", ("CoOp",), (1,), validation=True)
    train, test = chosen.chains()[0]
    assert "SUBSAMPLE_CLASSES inner-base" in " ".join(train.arguments) and "train_inner-base" in str(train.folder)
    assert "SUBSAMPLE_CLASSES inner-new" in " ".join(test.arguments)
    assert run(chosen, launcher="cached")[0] == []
    found = {(result.dataset, result.kind) for result in find_results([tmp_path / "output"])}
    assert found == {("IconScenes (validation)", "base"), ("IconScenes (validation)", "new")}
    with pytest.raises(ValueError, match="--validation: PromptKD trains on all classes' images"):
        real(tmp_path, "base2new", ("PromptKD",), (1,), validation=True).chains()


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "configs/trainers").glob("*Spotlighter/*.yaml")),
    ids=lambda path: f"{path.parent.name} {path.stem}",
)
def test_every_variant_of_every_ablation_fits_every_bundled_configuration(path):
    for variants in ABLATIONS.values():
        for option, value in variants.values():
            cfg = get_cfg_default()
            extend_cfg(cfg)
            given = yaml.safe_load(path.read_text()).get("TRAINER", {}).get("SPOTLIGHTER", {})
            cfg.TRAINER.SPOTLIGHTER.merge_from_other_cfg(CfgNode(given))
            cfg.merge_from_list([option, value])
            from_cfg(cfg)


def test_an_ablation_sweeps_its_variants_and_sets_them_beside_the_papers(home):
    ablation = Ablation("VIII", plan(home, hosts=("CoOpSpotlighter",)))
    failures, said = run(ablation, jobs=2)
    assert failures == [] and "4 of 4 runs are complete" in said
    (table,) = ablation.tables()
    assert [variant for variant, _ in table.rows] == ["without", "with"]
    assert [cell.paper for cell in table.rows[0][1]] == [77.52, 71.43, 74.35]
    assert all(cell.mean is not None and not cell.missing for _, cells in table.rows for cell in cells)
    assert run(ablation)[1].startswith("ablation VIII: 4 runs, 4 of them complete")


def test_an_ablation_on_cached_states_prints_a_table_that_curves_can_draw(tmp_path, monkeypatch, capsys):
    fewer_scenes(monkeypatch)
    monkeypatch.setitem(ABLATIONS, "figure4", {f"top_k {k}": ("TRAINER.SPOTLIGHTER.TOP_K", str(k)) for k in (4, 8)})
    arguments = ["ablate", "figure4", "--launcher", "cached", "--validation", "--seeds", "1", "--format", "csv"]
    arguments += ["--root", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--", *TINY[:-2]]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "DATASET.NUM_SHOTS", "2"])
    printed = capsys.readouterr()
    assert ended.value.code == 0 and "4 of 4 runs are complete" in printed.err
    (tmp_path / "k.csv").write_text(printed.out)
    points = read_points(tmp_path / "k.csv")
    assert {point[:3] for point in points} == {("top_k", part, k) for part in ("Base", "Novel", "HM") for k in (4, 8)}


def test_backbones_are_the_bundled_ones_on_icon_scenes_and_openais_elsewhere(home):
    backbones = lambda *datasets: [  # noqa: E731
        plan.options[-1] for plan in Ablation("X", plan(home, datasets=datasets)).variants().values()
    ]
    assert backbones("icon_scenes", "icons") == ["micro", "tiny"]
    assert backbones("dtd") == backbones("icon_scenes", "dtd") == backbones() == ["ViT-B/16", "ViT-L/14"]


@pytest.mark.parametrize("name", ["figure5a", "figure6a", "XII"])
def test_an_ablation_of_what_nothing_reads_is_one_line_and_the_papers_preset_has_it(home, name):
    with pytest.raises(ValueError, match=rf"ablation {name} varies .*: add -- TRAINER.SPOTLIGHTER.PRESET paper"):
        Ablation(name, plan(home, hosts=("CoOpSpotlighter",))).chains()
    options = ("TRAINER.SPOTLIGHTER.PRESET", "paper")
    assert Ablation(name, plan(home, hosts=("CoOpSpotlighter",), options=options)).chains()


def test_an_ablation_of_what_the_configuration_file_leaves_out_is_one_line(home):
    folder = home / "configs/trainers/CoOpSpotlighter"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bare.yaml").write_text("TRAINER:\n  SPOTLIGHTER:\n    LOSSES: []\n")
    options = ("TRAINER.SPOTLIGHTER.PRESET", "paper")
    bare = {"hosts": ("CoOpSpotlighter",), "config": "bare"}
    with pytest.raises(ValueError, match="varies .*LAMBDA1, .*LOSSES where --config bare leaves them out"):
        Ablation("figure6a", plan(home, options=options, **bare)).chains()
    options += ("TRAINER.SPOTLIGHTER.LOSSES", "('gra_low',)")
    assert Ablation("figure6a", plan(home, options=options, **bare)).chains()


def test_an_unknown_ablation_is_one_line(home):
    with pytest.raises(ValueError, match="unknown ablation 'IX': take V, VI"):
        Ablation("IX", plan(home)).chains()


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_variant_of_an_ablation_is_a_valid_option(name):
    for options in ABLATIONS[name].values():
        cfg = get_cfg_default()
        extend_cfg(cfg)
        cfg.merge_from_list([*options])
        from_cfg(cfg)


def test_the_command_line_takes_lists_after_an_option(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    arguments = "sweep fewshot --hosts CoOp coopspotlighter --datasets dtd caltech101 --seeds 1 2 --shots 4 --plan"
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments.split(), "--", "OPTIM.LR", "0.1"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and len(lines) == 2 * 2 * 2
    assert all(line.endswith("OPTIM.LR 0.1") for line in lines) and f"--output-dir {home}/output/dtd" in lines[0]


@pytest.mark.parametrize("arguments", ["sweep base2old", "sweep base2new --hosts None", "sweep base2new --datasets x"])
def test_the_command_prints_one_line_for_a_mistake(home, arguments, monkeypatch, capsys):
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments.split())
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("error: unknown ") and said.count("\n") == 1


def test_a_failed_sweep_exits_with_1(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as ended:
        cli.main(
            [
                "sweep",
                "fewshot",
                "--hosts",
                "CoOp",
                "--datasets",
                "dtd",
                "--seeds",
                "1",
                "--shots",
                "1",
                "--",
                "TRAINER.FAIL",
                "CoOp",
            ]
        )
    assert ended.value.code == 1 and "no such thing as luck" in capsys.readouterr().out


def said_of_its_size(home):
    logs = [log.read_text().splitlines() for log in (home / "output").rglob("log.txt")]
    return {line for lines in logs for line in lines if "GPUs" in line}


def test_a_run_of_several_gpus_is_as_many_processes_that_see_them(home, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    failures, _ = run(plan(home, "fewshot", hosts=("CoOp",), shots=(1,)), gpus_per_run=2)
    assert failures == [] and said_of_its_size(home) == {"2 processes, GPUs 4,5"}
    failing = plan(home, "fewshot", shots=(1,), seeds=(2,), options=("TRAINER.FAIL", "CoOp"))
    failures, _ = run(failing, gpus_per_run=2)
    assert len(failures) == 1 and "no such thing as luck" in failures[0]
    with pytest.raises(ValueError, match="--gpus-per-run is 4, CUDA_VISIBLE_DEVICES names 3"):
        run(plan(home, seeds=(3,)), gpus_per_run=4)
    with pytest.raises(ValueError, match="--gpus-per-run is -1, must be at least 0"):
        run(plan(home), gpus_per_run=-1)


def test_slurm_gets_the_same_plan_and_jobs_of_the_size_of_a_run(home, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("SPOTLIGHTER_SUBMITIT", "local")
    sizes, update = [], submitit.AutoExecutor.update_parameters
    monkeypatch.setattr(
        submitit.AutoExecutor, "update_parameters", lambda self, **size: (sizes.append(size), update(self, **size))[1]
    )
    failures, said = run(plan(home, seeds=(1, 2)), jobs=2, launcher="slurm", gpus_per_run=0)
    assert failures == [] and "4 of 4 runs are complete" in said
    assert (sizes[0]["gpus_per_node"], sizes[0]["cpus_per_task"]) == (0, 8)


def test_slurm_without_a_cluster_is_one_line(home, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="--launcher slurm: "):
        run(plan(home), launcher="slurm")


@pytest.mark.slow
def test_ray_gets_the_same_plan_and_jobs_of_the_size_of_a_run(home):
    ray = pytest.importorskip("ray")
    failures, said = run(plan(home, seeds=(1, 2)), jobs=2, launcher="ray", gpus_per_run=2)
    ray.shutdown()
    assert failures == [] and "4 of 4 runs are complete" in said
    assert {line.split(",")[0] for line in said_of_its_size(home)} == {"2 processes"}
