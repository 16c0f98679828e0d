"""Reports: that logs are read as upstream writes them, and that tables say what the runs say and what they lack."""

import csv
import io
import json
import re
import statistics

import pytest

from spotlighter_plugin import cli
from spotlighter_plugin.workbench.reports.report import (
    NUMBERS,
    PAPER,
    as_csv,
    as_latex,
    as_markdown,
    as_text,
    make_tables,
    read_benches,
)
from spotlighter_plugin.workbench.reports.results import find_results
from spotlighter_plugin.workbench.sweeps.ablate import ABLATIONS
from spotlighter_plugin.workbench.sweeps.plan import HERE, PROTOCOLS
from spotlighter_plugin.workbench.training.runs import progress, read_run, same

HEAD = """***************
** Arguments **
***************
backbone:{space}
config_file: configs/trainers/CoOp/{config}.yaml
eval_only: {eval_only}
model_dir: {model_dir}
seed: {seed}
trainer: {trainer}
************
** Config **
************
DATALOADER:
  NUM_WORKERS: 8
  TRAIN_X:
    BATCH_SIZE: 32
    N_DOMAIN: 0
DATASET:
  ALL_AS_UNLABELED: False
  NAME: {dataset}
  NUM_SHOTS: {shots}
  ROOT: /data
  SOURCE_DOMAINS: ()
  SUBSAMPLE_CLASSES: {half}
INPUT:
  INTERPOLATION: bicubic
  PIXEL_MEAN: [0.48145466, 0.4578275, 0.40821073]
OPTIM:
  LR: {lr}
  MAX_EPOCH: 2
OUTPUT_DIR: {folder}
RESUME:{space}
SEED: {seed}
TRAINER:
  COOP:
    CTX_INIT:{space}
    N_CTX: 16
  MODAL: {modal}
  NAME: {trainer}
VERSION: 1
Collecting env info ...
** System info **
PyTorch version: 2.0
OS: Linux

Loading trainer: {trainer}
"""
EPOCHS = """epoch [1/2] batch [5/8] time 0.109 (0.201) data 0.000 (0.038) loss 1.7 (1.9) lr 1e-05 eta 0:00:12
epoch [2/2] batch [5/8] time 0.109 (0.201) data 0.000 (0.038) loss 1.6 (1.8) lr 2e-03 eta 0:00:01
Checkpoint saved to x/prompt_learner/model.pth.tar-2
Finish training
Deploy the last-epoch model
"""


def result(correct, split="test", total=2000):
    return (
        f"Evaluate on the *{split}* set\n=> result\n* total: {total:,}\n* correct: {correct:,}\n"
        f"* accuracy: {100 * correct / total:.1f}%\n* error: {100 - 100 * correct / total:.1f}%\n* macro_f1: 70.2%\n"
    )


class Runs:
    """Writes upstream's logs."""

    def __init__(self, root):
        self.root, self.count = root, 0

    def log(self, correct, half="base", trainer="CoOp", dataset="Caltech101", seed=1, ending=None, **more):
        """One run with `correct` of 2000 right; ending replaces what follows the header."""
        self.count += 1
        folder = self.root / f"run{self.count}/seed{seed}"
        folder.mkdir(parents=True)
        evaluates = more.pop("eval_only", half == "new")
        values = {
            "shots": 16,
            "lr": "0.002",
            "model_dir": "output/imagenet/CoOp" if evaluates else "",
            "config": "vit_b16",
        } | more
        values = {"modal": "base2novel", **values}
        head = HEAD.format(
            half=half,
            trainer=trainer,
            dataset=dataset,
            seed=seed,
            eval_only=evaluates,
            folder=folder,
            space=" ",
            **values,
        )
        if ending is None:
            ending = ("" if evaluates else EPOCHS) + result(correct)
        (folder / "log.txt").write_text(head + ending)
        return folder

    def pair(self, base, new, **more):
        self.log(base, "base", **more)
        self.log(new, "new", **more)

    def tables(self, *numbers, benches=(), config=""):
        self.said = []
        results = find_results([self.root], config, warn=self.said.append)
        return make_tables(results, benches, numbers)


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path / "output")


def cell(tables, number, title_end, method, column):
    (table,) = [each for each in tables if each.number == number and each.title.endswith(title_end)]
    return dict(zip(table.columns, dict(table.rows)[method], strict=True))[column]


def test_upstreams_log_gives_settings_flags_and_the_unrounded_accuracy(runs):
    run = read_run(runs.log(1473, seed=3))
    assert run.accuracy == {"test": 73.65} and run.complete and not run.evaluates_only
    assert run.settings["DATASET.NAME"] == "Caltech101" and run.settings["TRAINER.COOP.N_CTX"] == "16"
    assert run.settings["DATALOADER.TRAIN_X.BATCH_SIZE"] == "32" and run.settings["SEED"] == "3"
    assert run.arguments["config_file"] == "configs/trainers/CoOp/vit_b16.yaml" and run.arguments["backbone"] == ""


def test_validation_during_training_is_not_the_result(runs):
    ending = result(100, "val") + result(300, "val") + result(200, "val") + EPOCHS
    assert not read_run(runs.log(0, ending=ending)).complete
    assert read_run(runs.log(0, ending=ending + result(1000))).accuracy == {"test": 50.0, "val": 15.0}


@pytest.mark.parametrize("cut", ["epoch [2/2] batch", "Finish training", "=> result", "* correct"])
def test_a_log_cut_anywhere_is_incomplete(runs, cut):
    folder = runs.log(1000)
    text = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(text[: text.index(cut)])
    assert not read_run(folder).complete


def test_the_last_complete_log_of_a_continued_run_counts(runs):
    folder = runs.log(0, ending=EPOCHS.partition("epoch [2")[0])
    assert read_run(folder).reached == "epoch [1/2]" and progress(folder) == pytest.approx(5 / 8 / 2)
    text = (folder / "log.txt").read_text()
    (folder / "log.txt-2026-01-02-10-00-00").write_text(text + EPOCHS + result(1500))
    (folder / "log.txt-2026-01-03-10-00-00").write_text(text)
    assert read_run(folder).accuracy == {"test": 75.0}


def test_printed_settings_are_compared_by_value():
    assert same("0.10", "0.1") and same("(1, 2)", "[1, 2]") and same("", "")
    assert not same("16", "4") and not same("ViT-B/16", "ViT-B/32")


def test_table_1_has_mean_deviation_and_harmonic_mean_beside_the_papers(runs):
    base, new = (1900, 1950, 1920), (1700, 1800, 1840)
    for seed, correct in enumerate(zip(base, new, strict=True), 1):
        runs.pair(*correct, seed=seed)
    tables = runs.tables("I")
    b, n = (statistics.fmean(part) / 20 for part in (base, new))
    found = cell(tables, "I", "Caltech101", "CoOp", "Base")
    assert found.mean == pytest.approx(b) and found.std == pytest.approx(statistics.pstdev(base) / 20)
    assert found.paper == 98.00 and not found.missing
    hm = cell(tables, "I", "Caltech101", "CoOp", "HM")
    assert hm.mean == pytest.approx(2 * b * n / (b + n)) and hm.paper == 93.73
    assert "96.17 ± 1.03" in as_text(tables) and "93.73" in as_text(tables)


def test_the_average_is_over_the_eleven_and_says_how_many_it_lacks(runs):
    names = [name for name in PAPER["I"]["blocks"] if name != "Average"]
    for i, name in enumerate(names[:-1]):
        runs.pair(1000 + 10 * i, 900, dataset=name)
    average = cell(runs.tables("I"), "I", ": Average", "CoOp", "Base")
    assert average.missing == "10/11 sets" and average.paper == 82.69
    runs.pair(1100, 900, dataset=names[-1])
    average = cell(runs.tables("I"), "I", ": Average", "CoOp", "Base")
    assert not average.missing and average.mean == pytest.approx((sum(range(1000, 1101, 10))) / 11 / 20)


def test_incomplete_cells_are_shown_as_such(runs):
    for seed in (1, 2):
        runs.pair(1900, 1700, seed=seed)
    half = runs.log(0, seed=3, ending=EPOCHS.partition("epoch [2")[0])
    tables = runs.tables("I")
    assert str(cell(tables, "I", "Caltech101", "CoOp", "Base")) == "95.00 ± 0.00 (incomplete 2/3)"
    assert cell(tables, "I", "Caltech101", "CoOp", "HM").missing == "2/3"
    assert runs.said == [f"{half}: half-written log, it ends in epoch [1/2]; its cell is marked incomplete"]
    runs.log(0, trainer="CoOpSpotlighter", ending="")
    assert str(cell(runs.tables("I"), "I", "Caltech101", "CoOp w/ Spotlighter", "Base")) == "incomplete 0/1"
    assert str(cell(runs.tables("I"), "I", "Caltech101", "MaPLe", "Base")) == "–"


def test_a_log_without_settings_is_left_out_with_one_line(runs):
    runs.pair(1900, 1700)
    broken = runs.log(1000)
    (broken / "log.txt").write_text("***************\n** Arguments **\n")
    runs.tables("I")
    assert runs.said == [f"{broken}: the log ends before the settings, left out"]


def test_runs_of_different_settings_are_refused_in_one_line(runs):
    runs.log(1900, seed=1)
    runs.log(1900, seed=2, lr="0.0020")
    assert runs.tables("I")
    runs.log(1900, seed=3, lr="0.01", config="other")
    with pytest.raises(ValueError) as caught:
        runs.tables("I")
    said = str(caught.value)
    assert "OPTIM.LR is 0.002 in" in said and "and 0.01 in" in said and "--config" in said and "\n" not in said
    assert cell(runs.tables("I", config="vit_b16"), "I", "Caltech101", "CoOp", "Base").mean == 95
    assert cell(runs.tables("I", config="other"), "I", "Caltech101", "CoOp", "Base").mean == 95


def test_the_same_seed_twice_with_different_results_is_refused(runs):
    runs.log(1900)
    runs.log(1900)
    assert runs.tables("I")
    runs.log(1000)
    with pytest.raises(ValueError, match=r"two results for CoOp on Caltech101 \(base, seed 1\)"):
        runs.tables("I")


def test_table_2_has_a_column_for_each_number_of_shots(runs):
    for shots, correct in ((1, 1000), (4, 1200)):
        runs.log(correct, "all", dataset="EuroSAT", shots=shots)
    runs.log(800, "all", trainer="ZeroshotCLIP", dataset="EuroSAT", shots=-1, eval_only=True, model_dir="")
    tables = runs.tables("II")
    assert [cell(tables, "II", "EuroSAT", "CoOp", f"{k}-shot").mean for k in (1, 2, 4)] == [50, None, 60]
    assert [cell(tables, "II", "EuroSAT", "CLIP", f"{k}-shot").mean for k in (1, 16)] == [40, 40]
    average = cell(tables, "II", ": Average", "CoOp", "4-shot")
    assert average.missing == "1/11 sets" and average.paper == 73.59


def test_table_3_has_source_and_targets(runs):
    runs.log(1400, "all", dataset="ImageNet")
    for i, name in enumerate(("ImageNetV2", "ImageNetSketch", "ImageNetA", "ImageNetR", "Food101")):
        runs.log(1000 + 100 * i, "all", dataset=name, eval_only=True)
    tables = runs.tables()
    assert cell(tables, "III", "16 shots", "CoOp", "ImageNet").mean == 70
    assert cell(tables, "III", "16 shots", "CoOp", "ImageNetR").mean == 65
    assert cell(tables, "III", "16 shots", "CoOp", "Average").mean == pytest.approx(57.5)
    assert cell(tables, "III", "16 shots", "MaPLe w/ Spotlighter", "ImageNetA").paper == 69.83
    assert cell(tables, "cross-dataset", "paper)", "CoOp", "Food101").mean == 70


def test_a_model_trained_elsewhere_is_not_taken_for_imagenets(runs):
    trained = runs.log(1000, "all", dataset="EuroSAT")
    runs.log(1600, "all", dataset="Food101", eval_only=True, model_dir=trained)
    assert {table.number for table in runs.tables()} == {"II"}
    runs.log(1400, "all", dataset="Food101", eval_only=True)
    assert cell(runs.tables(), "cross-dataset", "paper)", "CoOp", "Food101").mean == 70


def test_table_4_takes_speed_from_benchmarks(runs, tmp_path):
    runs.pair(1500, 1400, dataset="ImageNet", trainer="CoOpSpotlighter")
    bench = {"host": "coop", "images_per_second_host": 50.0, "images_per_second_spotlighter": 100.5}
    (tmp_path / "bench_cpu.json").write_text(json.dumps({**bench, "extra_parameters": 21, "device": "cpu"}))
    tables = runs.tables("IV", benches=read_benches([tmp_path]))
    found = [cell(tables, "IV", "4090)", "CoOp w/ Spotlighter", column) for column in ("Params", "FPS", "HM")]
    assert [str(each) for each in found] == ["+21", "100.50", "72.41"]
    assert [each.paper for each in found] == ["+21", 10654.82, 73.58]
    (tmp_path / "bench_cpu.json").write_text("{}")
    with pytest.raises(ValueError, match="bench_cpu.json is not what `spotlighter bench --json` writes"):
        read_benches([tmp_path])


def test_table_7_has_the_gain_of_each_host(runs):
    for name in (name for name in PAPER["I"]["blocks"] if name != "Average"):
        runs.pair(1600, 1400, dataset=name, trainer="MaPLe")
        runs.pair(1660, 1480, dataset=name, trainer="MaPLeSpotlighter")
    tables = runs.tables("VII")
    gain = cell(tables, "VII", ": Average", "gain", "Novel")
    assert gain.text == "+4.00" and gain.paper == "+2.31"


def test_promptkd_reports_both_halves_in_one_run(runs):
    runs.log(0, "all", trainer="PromptKD", shots=0, ending=result(1800, "val") + EPOCHS + result(1500))
    tables = runs.tables("I")
    assert [cell(tables, "I", "Caltech101", "PromptKD", half).mean for half in ("Base", "Novel")] == [90, 75]


def test_upstreams_clipfit_and_new_trainers_have_rows(runs):
    runs.pair(1500, 1400, trainer="ClipFit")
    runs.pair(1500, 1400, trainer="IVLP")
    tables = runs.tables("I")
    assert cell(tables, "I", "Caltech101", "CLIPFit", "Base").paper == 98.30
    assert cell(tables, "I", "Caltech101", "IVLP", "Base").paper is None


def test_each_format_holds_every_cell(runs):
    for seed in (1, 2):
        runs.pair(1900 + seed, 1700, seed=seed)
    tables = runs.tables("I")
    rows = list(csv.DictReader(io.StringIO(as_csv(tables))))
    (row,) = [r for r in rows if (r["title"][-10:], r["method"], r["column"]) == ("Caltech101", "CoOp", "Base")]
    assert float(row["mean"]) == pytest.approx(95.075) and row["paper"] == "98.0" and row["table"] == "I"
    markdown = as_markdown(tables)
    assert "| CoOp | 95.07 ± 0.03 | 98.00 |" in markdown.replace("95.08", "95.07").replace("± 0.02", "± 0.03")
    latex = as_latex(tables)
    assert r"$\pm$" in latex and "±" not in latex and latex.count(r"\begin{tabular}") == len(tables)
    assert all("Table I (page 6)" in text for text in (as_text(tables), markdown, latex))


def test_the_papers_harmonic_means_are_those_of_its_bases_and_novels():
    """Apart from the five that the data file lists, so a typing error in it would be seen."""
    odd = set()
    for block, rows in PAPER["I"]["blocks"].items():
        for method, (base, new, hm) in rows.items():
            if abs(2 * base * new / (base + new) - hm) > 0.06:
                odd.add((block, method))
    assert odd == {
        ("Average", "PromptKD w/ Spotlighter"),
        ("ImageNet", "CoOp"),
        ("SUN397", "CoOp w/ Spotlighter"),
        ("DescribableTextures", "CoOp w/ Spotlighter"),
        ("EuroSAT", "CoOp w/ Spotlighter"),
    }


def test_the_papers_averages_are_those_of_its_eleven_data_sets():
    for method, average in PAPER["I"]["blocks"]["Average"].items():
        for i in (0, 1):
            mean = statistics.fmean(rows[method][i] for name, rows in PAPER["I"]["blocks"].items() if name != "Average")
            assert abs(mean - average[i]) < (0.1 if method == "CoOp" else 0.06)


def test_every_table_and_figure_of_the_paper_has_its_command():
    text = (HERE / "docs/reproduce.md").read_text(encoding="utf-8")
    tables, figures = text.split("## Tables")[1].split("## Figures")
    rows = [
        [line.split("|")[1].strip() for line in part.split("##")[0].splitlines() if line.startswith("|")][2:]
        for part in (tables, figures)
    ]
    assert rows == [
        ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII"],
        ["1", "2", "3", "4", "5", "6", "7"],
    ]
    for command, name in re.findall(r"`spotlighter (sweep|ablate) (\w+)", text):
        assert name in {"sweep": PROTOCOLS, "ablate": ABLATIONS}[command], name
    assert set(re.findall(r"report output --table ([\w-]+)", text)) == set(NUMBERS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("report nowhere", "nowhere: no such folder of runs"),
        ("report {empty}", "no run in "),
        ("report {runs} --table XX", "unknown table 'XX': take I, II, III, IV, VII"),
        ("report {runs} --table II", "no run for table II"),
        ("report {runs} --format html", "unknown format 'html': take text, markdown, csv, latex"),
        ("report {runs} --config rn50", "with --config rn50"),
    ],
)
def test_a_mistake_is_one_line(runs, tmp_path, arguments, says, capsys):
    runs.pair(1900, 1700)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments.format(runs=runs.root, empty=tmp_path / "empty").split())
    said = capsys.readouterr().err
    assert ended.value.code == 1 and says in said and said.startswith("error: ") and said.count("\n") == 1


def test_the_command_writes_the_report(runs, tmp_path, capsys):
    runs.pair(1900, 1700)
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(runs.root), "--format", "markdown", "--output", str(tmp_path / "table.md")])
    assert ended.value.code == 0 and "| CoOp | 95.00 |" in (tmp_path / "table.md").read_text()
