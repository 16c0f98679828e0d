"""Our part of Dassl's interface, against what Dassl promises and against the real one where it is installed."""

import random
import sys

import numpy as np
import pytest
import torch
from dassl.config import get_cfg_default
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spotlighter_plugin.runtime.dassl import evaluation, metrics, optim, utils
from spotlighter_plugin.runtime.dassl.config import clean_cfg
from spotlighter_plugin.runtime.dassl.config import get_cfg_default as our_defaults
from spotlighter_plugin.runtime.dassl.data import samplers
from spotlighter_plugin.runtime.dassl.data.datasets import DatasetBase, Datum
from spotlighter_plugin.runtime.dassl.data.transforms import build_transform


def data_of(labels, domains=None):
    domains = domains or [0] * len(labels)
    return [
        Datum(f"{i}.png", label, domain, f"c{label}")
        for i, (label, domain) in enumerate(zip(labels, domains, strict=True))
    ]


# -- configuration ----------------------------------------------------------------------------------------------


def test_every_key_has_the_default_of_whichever_dassl_is_installed():
    ours, installed = our_defaults(), get_cfg_default()
    installed.TRAINER = ours.TRAINER  # the real one lists its own methods there
    assert ours == installed


def test_clean_cfg_keeps_the_named_trainer_alone():
    cfg = our_defaults()
    cfg.TRAINER.COOP, cfg.TRAINER.MAPLE = type(cfg)(), type(cfg)()
    clean_cfg(cfg, "CoOp")
    assert set(cfg.TRAINER) == {"NAME", "COOP"}


def test_two_configurations_do_not_share_nodes():
    first, second = our_defaults(), our_defaults()
    first.OPTIM.LR, first.DATALOADER.TRAIN_X.BATCH_SIZE = 9.0, 7
    assert (second.OPTIM.LR, second.DATALOADER.TRAIN_X.BATCH_SIZE) == (0.0003, 32)
    assert second.DATALOADER.TRAIN_U.BATCH_SIZE == 32


# -- data -------------------------------------------------------------------------------------------------------


def test_few_shots_are_drawn_class_by_class_with_pythons_generator():
    data = data_of([0] * 5 + [1] * 2)
    random.seed(3)
    drawn = DatasetBase.generate_fewshot_dataset(DatasetBase.__new__(DatasetBase), data, num_shots=3)
    random.seed(3)
    assert drawn == [*random.sample(data[:5], 3), *data[5:]]


def test_few_shots_fill_up_a_small_class_when_asked():
    data = data_of([0, 0])
    drawn = DatasetBase.generate_fewshot_dataset(DatasetBase.__new__(DatasetBase), data, num_shots=4, repeat=True)
    assert len(drawn) == 4 and set(drawn) <= set(data)


def test_class_names_are_in_the_order_of_labels():
    data = DatasetBase(train_x=data_of([2, 0, 1, 0]), test=[])
    assert data.classnames == ["c0", "c1", "c2"] and data.lab2cname[2] == "c2" and data.num_classes == 3


def test_a_gap_in_the_labels_and_an_empty_set_are_errors():
    with pytest.raises(ValueError, match="1 of 3 classes have no training image: label 1"):
        DatasetBase(train_x=data_of([0, 2]))
    with pytest.raises(ValueError, match="no training image"):
        DatasetBase(train_x=[])


@given(st.lists(st.integers(0, 3), min_size=8, max_size=40), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_the_class_sampler_fills_each_batch_with_whole_groups_of_distinct_classes(labels, n_ins, n_classes):
    if n_classes > len(set(labels)):
        return
    sampler = samplers.RandomClassSampler(data_of(labels), n_ins * n_classes, n_ins)
    order = list(sampler)
    assert len(order) % (n_ins * n_classes) == 0
    for start in range(0, len(order), n_ins * n_classes):
        batch = [labels[i] for i in order[start : start + n_ins * n_classes]]
        assert all(batch.count(label) == n_ins for label in batch)


def test_the_domain_sampler_takes_equally_many_from_each_domain_and_no_image_twice():
    domains = [0] * 7 + [1] * 9 + [2] * 5
    for kind in ("RandomDomainSampler", "SeqDomainSampler"):
        order = list(samplers.build_sampler(kind, None, data_of([0] * 21, domains), batch_size=6))
        assert len(order) == len(set(order)) == 12
        assert all(sorted(domains[i] for i in order[k : k + 6]) == [0, 0, 1, 1, 2, 2] for k in (0, 6))


def test_impossible_batches_and_unknown_samplers_are_errors():
    with pytest.raises(ValueError, match="N_DOMAIN"):
        samplers.DomainSampler(data_of([0] * 4, [0, 0, 1, 1]), 3)
    with pytest.raises(ValueError, match="N_INS"):
        samplers.RandomClassSampler(data_of([0, 1]), 8, 2)
    with pytest.raises(ValueError, match="Sampler"):
        samplers.build_sampler("Sampler", None, data_of([0]))


@pytest.mark.parametrize("kind", ["RandomDomainSampler", "RandomClassSampler"])
def test_a_sampler_draws_what_the_installed_dassl_draws(kind):
    from dassl.data.samplers import build_sampler

    rng = random.Random(5)
    data = data_of([rng.randrange(4) for _ in range(60)], [rng.randrange(3) for _ in range(60)])
    orders = []
    for build in (build_sampler, samplers.build_sampler):
        utils.set_random_seed(1)
        orders.append(list(build(kind, data_source=data, batch_size=12, n_domain=2, n_ins=3)))
    assert orders[0] == orders[1]


CHOICES = ["random_translation", "random_flip", "colorjitter", "cutout", "normalize", "gaussian_noise"]


@pytest.mark.parametrize("choices", [CHOICES, ["random_resized_crop", "instance_norm"], ["random_crop"], []])
@pytest.mark.parametrize("is_train", [True, False])
def test_a_transform_gives_the_pixels_of_the_installed_dassl(choices, is_train):
    from dassl.data.transforms import build_transform as installed

    cfg = get_cfg_default()
    cfg.INPUT.SIZE, cfg.INPUT.INTERPOLATION = (20, 20), "bicubic"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    results = []
    for build in (installed, build_transform):
        transform = build(cfg, is_train, choices)
        utils.set_random_seed(2)
        results.append(torch.stack([transform(image) for _ in range(6)]))
    assert results[1].shape == (6, 3, 20, 20)
    torch.testing.assert_close(*results)


def test_an_unknown_transform_is_named():
    with pytest.raises(ValueError, match="random_filp"):
        build_transform(our_defaults(), choices=["random_filp"])


# -- optimisation -----------------------------------------------------------------------------------------------


def rates(build, **settings):
    cfg = our_defaults().OPTIM
    for key, value in {"NAME": "sgd", "LR": 0.1, "MAX_EPOCH": 8, "LR_SCHEDULER": "cosine", **settings}.items():
        cfg[key] = value
    optimizer = optim.build_optimizer([torch.nn.Parameter(torch.ones(1))], cfg)
    scheduler, seen = build(optimizer, cfg), []
    for _ in range(cfg.MAX_EPOCH):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


WARM = {"WARMUP_EPOCH": 3}


def test_constant_warm_up_holds_its_rate_and_hands_over_the_base_rate():
    seen = rates(optim.build_lr_scheduler, **WARM, WARMUP_TYPE="constant", WARMUP_CONS_LR=1e-3)
    assert seen[:4] == [1e-3, 1e-3, 1e-3, 0.1]
    assert seen[4] == pytest.approx(0.05 * (1 + np.cos(np.pi / 8)))


def test_linear_warm_up_rises_from_its_floor():
    seen = rates(optim.build_lr_scheduler, **WARM, WARMUP_TYPE="linear", WARMUP_MIN_LR=1e-4)
    assert seen[:4] == pytest.approx([1e-4, 0.1 / 3, 0.2 / 3, 0.1])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {**WARM, "WARMUP_TYPE": "constant"},
        {**WARM, "WARMUP_TYPE": "linear", "WARMUP_RECOUNT": False},
        {"LR_SCHEDULER": "single_step", "STEPSIZE": (3,)},
        {"LR_SCHEDULER": "multi_step", "STEPSIZE": (2, 5), **WARM},
    ],
)
def test_a_schedule_follows_the_installed_dassl(settings):
    from dassl.optim import build_lr_scheduler

    assert rates(optim.build_lr_scheduler, **settings) == rates(build_lr_scheduler, **settings)


@pytest.mark.parametrize("schedule", ["cosine", "single_step", "multi_step"])
def test_a_schedule_continues_from_its_saved_state(schedule, tmp_path):
    cfg = our_defaults().OPTIM
    cfg.merge_from_list(["NAME", "sgd", "LR", 0.1, "MAX_EPOCH", 8, "LR_SCHEDULER", schedule, "STEPSIZE", (2,)])
    cfg.merge_from_list(["WARMUP_EPOCH", 2])

    def build():
        optimizer = optim.build_optimizer([torch.nn.Parameter(torch.ones(1))], cfg)
        return optimizer, optim.build_lr_scheduler(optimizer, cfg)

    def steps(optimizer, scheduler, number):
        for _ in range(number):
            optimizer.step()
            scheduler.step()
        return optimizer.param_groups[0]["lr"]

    expected = steps(*build(), 5)
    optimizer, scheduler = build()
    steps(optimizer, scheduler, 3)
    torch.save([optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state")
    states = torch.load(tmp_path / "state", weights_only=True)
    fresh = build()
    for part, state in zip(fresh, states, strict=True):
        part.load_state_dict(state)
    assert steps(*fresh, 2) == expected


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_each_optimizer_descends(name):
    cfg = our_defaults().OPTIM
    cfg.NAME, cfg.LR = name, 0.05
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = optim.build_optimizer([weight], cfg)
    for _ in range(20):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert abs(weight.item()) < 0.8


def test_staged_rates_slow_the_old_layers_down():
    cfg = our_defaults().OPTIM
    cfg.STAGED_LR, cfg.NEW_LAYERS = True, ("1",)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    base, new = optim.build_optimizer(model, cfg).param_groups
    assert base["lr"] == pytest.approx(cfg.LR * cfg.BASE_LR_MULT) and new["lr"] == cfg.LR
    assert new["params"] == list(model[1].parameters())


# -- evaluation -------------------------------------------------------------------------------------------------

LABELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


@given(LABELS)
@settings(max_examples=60, deadline=None)
def test_macro_f1_is_the_mean_of_the_classes_f1(pairs):
    true, pred = (np.array(x) for x in zip(*pairs, strict=True))
    scores = []
    for label in set(true.tolist()):
        hits = sum(t == p == label for t, p in pairs)
        precision = hits / max(sum(p == label for _, p in pairs), 1)
        recall = hits / sum(t == label for t, _ in pairs)
        scores.append(0.0 if hits == 0 else 2 * precision * recall / (precision + recall))
    assert evaluation.macro_f1(true, pred) == pytest.approx(np.mean(scores))


def test_the_evaluator_prints_and_saves_what_it_is_asked_for(tmp_path, capsys):
    cfg = our_defaults()
    cfg.TEST.PER_CLASS_RESULT, cfg.TEST.COMPUTE_CMAT, cfg.OUTPUT_DIR = True, True, str(tmp_path)
    evaluator = evaluation.build_evaluator(cfg, lab2cname={0: "cat", 1: "dog"})
    evaluator.process(torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 1, 1, 1]))
    results = evaluator.evaluate()
    out = capsys.readouterr().out
    assert "* total: 4\n* correct: 3\n* accuracy: 75.0%\n* error: 25.0%\n" in out
    assert "* class: 1 (dog)\ttotal: 3\tcorrect: 2\tacc: 66.7%\n* average: 83.3%" in out
    assert list(results) == ["accuracy", "error_rate", "macro_f1", "perclass_accuracy"]
    assert torch.load(tmp_path / "cmat.pt").tolist() == [[1.0, 0.0], [pytest.approx(1 / 3), pytest.approx(2 / 3)]]
    evaluator.reset()
    with pytest.raises(ValueError, match="empty"):
        evaluator.evaluate()


def test_top_k_accuracy_counts_labels_among_the_k_best():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    top1, top2 = metrics.compute_accuracy(logits, torch.tensor([0, 1]), topk=(1, 2))
    assert (top1.item(), top2.item()) == (50.0, 100.0)


# -- utilities --------------------------------------------------------------------------------------------------


def test_a_registry_refuses_a_second_class_of_the_same_name():
    registry = utils.Registry("THING")

    @registry.register()
    class Thing:
        pass

    assert registry.get("Thing") is Thing and registry.registered_names() == ["Thing"]
    with pytest.raises(KeyError, match="Thing"):
        registry.register(Thing)
    with pytest.raises(KeyError, match="Other"):
        registry.get("Other")


def test_a_second_log_does_not_overwrite_the_first(tmp_path, monkeypatch):
    for text in ("first", "second"):
        monkeypatch.setattr(sys, "stdout", sys.stdout)
        utils.setup_logger(str(tmp_path))
        print(text)
        sys.stdout.close()
        monkeypatch.undo()
    logs = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert logs.pop("log.txt") == "first\n" and list(logs.values()) == ["second\n"]


class Surprise:
    """Pickles as a call that would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_checkpoint_with_foreign_objects_loads_without_running_them(tmp_path):
    trap = tmp_path / "trap"
    state = {"state_dict": {"w": torch.arange(3.0).half()}, "epoch": 5, "scheduler": Surprise(trap)}
    torch.save(state, tmp_path / "model.pth.tar-5")
    loaded = utils.load_checkpoint(tmp_path / "model.pth.tar-5")
    assert loaded["state_dict"]["w"].tolist() == [0, 1, 2] and loaded["epoch"] == 5
    assert not trap.exists()


def test_damaged_and_missing_checkpoints_are_one_line_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        utils.load_checkpoint(str(tmp_path / "none"))
    torch.save({"state_dict": {"w": torch.zeros(1000)}}, tmp_path / "whole")
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[:900])
    (tmp_path / "text").write_text("no checkpoint at all")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("half", "text", "empty"):
        with pytest.raises(ValueError, match="no readable checkpoint") as caught:
            utils.load_checkpoint(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    utils.save_checkpoint({"state_dict": {"module.w": torch.ones(1)}, "epoch": 1}, str(tmp_path))
    assert list(utils.load_checkpoint(str(tmp_path / "model.pth.tar-1"))["state_dict"]) == ["w"]

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        utils.save_checkpoint({"state_dict": {}, "epoch": 2}, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "model.pth.tar-1"}


def test_pretrained_weights_fill_what_fits_and_name_the_rest(tmp_path, capsys):
    model = torch.nn.Linear(2, 3)
    torch.save({"module.weight": torch.ones(3, 2), "bias": torch.ones(4)}, tmp_path / "w.pt")
    before = model.bias.clone()
    utils.load_pretrained_weights(model, str(tmp_path / "w.pt"))
    assert torch.equal(model.weight, torch.ones(3, 2)) and torch.equal(model.bias, before)
    assert "['bias']" in capsys.readouterr().out


def test_only_the_named_layers_stay_trainable():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    utils.open_specified_layers(model, "1")
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert (model[0].training, model[1].training) == (False, True)
    with pytest.raises(ValueError, match="no layer"):
        utils.open_specified_layers(model, "head")


def test_meters_average():
    meter = utils.MetricMeter()
    meter.update({"loss": torch.tensor(1.0), "acc": 50})
    meter.update({"loss": 3.0})
    assert str(meter) == "loss 3.0000 (2.0000) acc 50.0000 (50.0000)"


def test_json_is_written_whole_and_read_back(tmp_path):
    utils.write_json({"a": [1, "ü"]}, tmp_path / "deep" / "x.json")
    assert utils.read_json(tmp_path / "deep" / "x.json") == {"a": [1, "ü"]}
    assert utils.listdir_nohidden(tmp_path / "deep") == ["x.json"]
