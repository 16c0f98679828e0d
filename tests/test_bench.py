"""The benchmark: what it times, what it writes, and what it says to bad input."""

import itertools
import json
import time
from functools import partial

import pytest
import torch

from spotlighter_plugin import cli
from spotlighter_plugin.config import SpotlighterConfig
from spotlighter_plugin.method.schedule import operations as counted
from spotlighter_plugin.method.selector import Selector
from spotlighter_plugin.workbench.speed import accuracy, bench
from spotlighter_plugin.workbench.speed.bench_hosts import build_host, logits_of, shape_of, text_owner, upstream_logits
from spotlighter_plugin.workbench.speed.stopwatch import alternate, operations, peak_memory, seconds, stages

CPU = torch.device("cpu")
SMALL = "image=32,patch=8,width=64,layers=3,dim=64,text_width=64,text_layers=2"
KEYS = [
    "host",
    "backbone",
    "device",
    "dtype",
    "batch_size",
    "classes",
    "select_block",
    "top_k",
    "images_per_second_host",
    "images_per_second_host_cached_text",
    "images_per_second_spotlighter",
    "speedup",
    "speedup_over_cached_text",
    "operations_ratio",
    "extra_parameters",
    "memory_mb",
    "peak_memory_mb_host",
    "peak_memory_mb_spotlighter",
    "runs",
]  # what others read; further ones stand behind them
COMPILED = ["images_per_second_host_compiled", "images_per_second_spotlighter_compiled", "speedup_compiled"]
JUDGED = ["accuracy_minus_host", "accuracy_low", "accuracy_high", "same_answers"]


def small_bench(host="coop", sweep="", **options):
    options = {"backbone": SMALL, "batch_size": 4, "classes": 5, "top_k": 6, "runs": 2, **options}
    return bench.Bench(bench.swept({"host": host, **options}, sweep))


@pytest.mark.parametrize("host", ["coop", "maple", "promptkd", "clipfit"])
def test_a_record_has_exactly_the_promised_keys_on_every_host(host):
    (record,) = small_bench(host).inference()
    assert list(record) == [*KEYS, "method", *COMPILED, "speedup_limit"]
    assert record["host"] == host and record["select_block"] == 2 and record["device"] == "cpu"
    assert all(record[key] > 0 for key in KEYS if "per_second" in key or "speedup" in key or "memory" in key)
    assert all(record[key] is None for key in COMPILED)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("host", ["coop", "maple", "promptkd", "clipfit"])
def test_half_precision_runs_on_every_host(host, dtype):
    made = small_bench(host, dtype=dtype)
    assert made.host.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert made.inference()[0]["dtype"] == dtype


@pytest.mark.parametrize("host", ["coop", "maple", "promptkd", "clipfit"])
def test_a_training_step_is_timed_and_trains_host_and_plug_in(host):
    made = small_bench(host)
    before = [p.clone() for p in made.wrappers[0].parameters() if p.requires_grad]
    made._step(made._loss_of(made.wrappers[0]), made.wrappers[0])()
    after = [p for p in made.wrappers[0].parameters() if p.requires_grad]
    assert any((b != a).any() for b, a in zip(before, after, strict=True))
    (record,) = made.training()
    assert all(record[f"{what}_ratio{of}"] > 0 for what in ("time", "memory") for of in ("", "_of_texts"))
    (record,) = made.training(alone=False)
    assert record["time_ratio_of_texts"] is None and record["time_ratio"] > 0
    assert not made.wrappers[0].training


@pytest.mark.parametrize("host", ["coop", "maple", "promptkd", "clipfit"])
def test_upstreams_way_and_cached_texts_give_the_same_logits(host):
    torch.manual_seed(0)
    model, images = build_host(host, shape_of(SMALL), 5), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        text = text_owner(model).text_features()
        ours, cached, theirs = model(images), logits_of(model, images, text), upstream_logits(model, images)
    assert torch.allclose(ours, cached, atol=1e-4) and torch.allclose(ours, theirs, atol=1e-4)


def test_upstreams_way_runs_the_text_tower_on_every_position_of_every_batch():
    model, images, lengths = build_host("coop", shape_of(SMALL), 5), torch.randn(2, 3, 32, 32), []
    model.text_encoder.transformer.register_forward_pre_hook(lambda module, args: lengths.append(len(args[0])))
    with torch.no_grad():
        upstream_logits(model, images)
        upstream_logits(model, images)
        model(images)
        model(images)
    assert lengths[:2] == [77, 77] and len(lengths) == 3 and lengths[2] < 77


def test_legs_take_turns_and_the_first_round_is_not_counted():
    order = []
    taken = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, CPU)
    assert order == ["a", "b"] * 3
    assert [len(times) for times in taken.values()] == [2, 2]


def test_on_one_thread_of_a_cpu_waiting_for_others_is_not_counted():
    assert seconds(lambda: time.sleep(0.3), CPU) < 0.1
    torch.set_num_threads(2)
    try:
        assert seconds(lambda: time.sleep(0.3), CPU) >= 0.3
    finally:
        torch.set_num_threads(1)


def test_a_speed_up_is_the_median_of_pairwise_ratios():
    assert bench._ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == 3.0  # not 8 / 2


def test_peak_memory_counts_what_is_held_at_once_beyond_what_was_there():
    resident = torch.ones(2**18)  # 1 MB of float32 per 2**18 numbers

    def work():
        first = torch.ones(8 * 2**18)
        del first
        second, third = torch.ones(6 * 2**18), torch.ones(5 * 2**18)
        return resident.sum() + second.sum() + third.sum()

    assert peak_memory(work, CPU) == pytest.approx(11, abs=0.1)


def test_operations_are_counted_by_hand_and_selection_saves_some():
    weight = torch.ones(5, 7)
    assert operations(lambda: torch.ones(3, 5) @ weight) == 2 * 3 * 5 * 7
    made = small_bench(sweep="select_block=0,2", options=("MAPPING", "none", "PROTOTYPE_LOGITS", "False"))
    (host, early), (same, late) = made.operations()
    assert host == same and early < late < host
    assert all(own > 0 for pair in made.operations(train=True) for own in pair)


def test_stages_add_up_to_the_pass_and_leave_the_wrapper_as_it_was():
    made = small_bench(select_block=2, options=("STAGES", "((1, 9),)"))
    wrapper = made.wrappers[0]
    with torch.no_grad():
        before, own = wrapper(made.images), dict(vars(Selector))
        found = stages(wrapper, made.images, 2, CPU)
        after = wrapper(made.images)
    assert all(part > 0 for part in found.values()) and len(found) == 5
    assert torch.equal(before, after) and dict(vars(Selector)) == own


def test_the_memory_is_full_so_that_its_evidence_is_timed():
    wrapper = small_bench().wrappers[0]
    memory, images = wrapper.plugin.memory, torch.randn(2, 3, 32, 32)
    assert memory.is_ready and memory.counts.tolist() == [16] * 5
    with torch.no_grad():
        known = wrapper(images)
        memory.weight.zero_()
        wrapper.refresh()
        assert not torch.allclose(wrapper(images), known)


def test_the_bank_is_full_so_that_its_match_is_timed():
    wrapper = small_bench(preset="paper", top_k=6).wrappers[0]
    assert wrapper.plugin.bank.filled.all() and not wrapper.plugin.bank.is_empty
    assert wrapper.config.semantic_activation


@pytest.mark.parametrize("host", ["coop", "maple", "clipfit"])
def test_texts_once_per_prefix_are_timed_beside_each_text_alone_and_are_the_same_step(host):
    made, seen, gradients = small_bench(host), [], {}
    owner = text_owner(made.host)
    encoder = getattr(owner, "text_encoder", None) or owner.prompt_learner.text_encoder
    encoder.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2].numel()))
    legs = made._training_legs(True)
    for name in ("alone", "host"):
        legs[name]()
        gradients[name] = [p.grad.clone() for p in made.host.parameters() if p.grad is not None]
    assert list(legs)[:2] == ["alone", "host"] and seen[0] > seen[-1]
    for alone, once in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(alone, once, atol=1e-2 * alone.abs().max().item(), rtol=0)  # a step lies between


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_other_methods_spend_the_share_of_operations_that_ours_does(share):
    settings = bench.swept({"share": share}, f"method={','.join(bench.METHODS)}")
    ours, random, merging, evit = (setting.steps for setting in settings)
    spent = [counted(setting.tower, setting.steps) / counted(setting.tower) for setting in settings]
    assert random == ours and max(abs(each - share) for each in spent) < 0.03
    assert all(step.merges or step.left == step.tokens for step in merging)
    assert [step.block for step in evit] == [3, 6, 9] and not any(step.merges for step in evit)
    assert settings[1].config.activation == "random" != settings[0].config.activation


def test_the_accuracy_beside_a_speed_is_that_of_the_same_blocks_and_tokens():
    kept = accuracy.read()
    for method, share in itertools.product(bench.METHODS, (0.5, 0.7)):
        setting = bench.Setting(share=share, method=method)
        row = accuracy.find(kept, setting.config, setting.tower)
        options = accuracy.schedules()[row.name]
        assert accuracy.config_of(options).steps(accuracy.BUNDLED) == setting.steps
        assert row.share == pytest.approx(share, abs=0.03) and row.low <= row.minus_host <= row.high
        record = bench.judge(kept, setting, {})
        assert list(record) == JUDGED and record["same_answers"] == row.same
    early = bench.Setting(select_block=4, top_k=32)
    assert accuracy.find(kept, early.config, early.tower).name == "select, s = 4, k = 32"


@pytest.mark.parametrize("given", [{"select_block": 5, "top_k": 33}, {"preset": "paper"}])
def test_no_accuracy_is_shown_for_what_the_bundled_tower_has_not_been_asked(given):
    setting = bench.Setting(**given)
    assert bench.judge(accuracy.read(), setting, {}) == dict.fromkeys(JUDGED)


def test_a_tower_of_other_tokens_is_judged_by_its_share_of_operations_or_not_at_all():
    kept, shared = accuracy.read(), bench.Setting(backbone="ViT-B/32", share=0.5)
    assert accuracy.find(kept, shared.config, shared.tower).name == "merge, then select, 0.5"
    placed = bench.Setting(backbone="ViT-B/32", select_block=11, top_k=32)
    assert accuracy.find(kept, placed.config, placed.tower, run=True) is None


def test_what_is_not_known_is_run_on_request(monkeypatch):
    ids = [("val", c, 0, 0) for c in range(4)]
    monkeypatch.setattr(accuracy, "scenes", lambda: (torch.randn(4, 3, 112, 112), [c for _, c, *_ in ids]))
    kept = {"labels": [], "answers": {}, "shares": {}}
    for dtype in ("fp32", "bf16"):
        setting = bench.Setting(select_block=2, top_k=20, dtype=dtype)
        assert bench.judge(kept, setting, {})["same_answers"] is None
        assert 0 <= bench.judge(kept, setting, {}, run=True)["same_answers"] <= 100
    host, single, half = kept["answers"]
    assert host == "host" and half == f"{single}, bf16" and kept["shares"][single] < 0.4


def test_compiled_rows_are_the_host_and_ours(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    ours, random = small_bench(sweep="method=spotlighter,random").inference(upstream=False, compiled=True)
    assert all(ours[key] > 0 for key in COMPILED) and random["speedup_compiled"] is None
    assert random["images_per_second_host"] is None and random["speedup"] is None


@pytest.mark.parametrize("host", ["coop", "maple"])
def test_the_limit_is_the_host_on_as_few_tokens_as_spotlighter_leaves(host):
    some, seen = small_bench(host), {True: [], False: []}
    (wrapper,), short = some.wrappers, [False]
    for block in wrapper.adapter.layout.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: seen[short[0]].append(len(args[0])))
    with torch.no_grad():
        text = some._kept_texts()
        seen[False].clear()
        wrapper(some.images)
        short[0] = True
        some._as_short(0, text)()
    assert seen[True] == seen[False] and seen[True][-1] < seen[True][0]


def test_a_sweep_is_every_combination():
    settings = bench.swept({"backbone": SMALL}, "select_block=1,-1,top_k=4,8,16")
    assert [(s.select_block, s.top_k) for s in settings] == [(1, 4), (1, 8), (1, 16), (-1, 4), (-1, 8), (-1, 16)]
    settings = bench.swept({"backbone": SMALL, "top_k": 4}, "batch_size=1,8,method=spotlighter,evit")
    assert [(s.batch_size, s.method) for s in settings] == [
        *((1, name) for name in ("spotlighter", "evit")),
        *((8, name) for name in ("spotlighter", "evit")),
    ]
    settings = bench.swept({"backbone": "ViT-B/16"}, "preset=default,paper")
    default, paper = ([(step.block, step.kept) for step in s.steps] for s in settings)
    assert [block for block, _ in default] == list(range(1, 12)) and paper == [(11, 32)]


def test_the_command_writes_records_and_a_picture(tmp_path, capsys):
    flags = ["--backbone", SMALL, "--classes", "5", "--runs", "1", "--device", "cpu", "--others"]
    files = ["--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "speed.svg")]
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *flags, "--sweep", "batch_size=1,4,top_k=4,8", "--profile", *files])
    assert end.value.code == 0
    records = json.loads((tmp_path / "bench.json").read_text())
    assert [record["batch_size"] for record in records] == [1] * 8 + [4] * 8
    assert {record["top_k"] for record in records if record["method"] == "random"} == {4, 8}
    assert list(records[0]) == [*KEYS, "method", *COMPILED, "speedup_limit", *JUDGED]
    assert all((record["speedup_limit"] is None) == (record["method"] != "spotlighter") for record in records)
    assert "<svg" in (tmp_path / "speed.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "speed.svg"]
    printed = capsys.readouterr().out
    assert "images/s" in printed and "outside" in printed and "texts kept" in printed and "merging" in printed


@pytest.mark.parametrize(
    "flags,names",
    [
        (["--host", "cocoop"], ["--host", "coop"]),
        (["--backbone", "RN50"], ["--backbone", "ViT-B/16"]),
        (["--backbone", "width=100"], ["width", "64"]),
        (["--backbone", "image=50,patch=16"], ["image 50", "patch 16"]),
        (["--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["--classes", "-3"], ["--classes", "at least 1"]),
        (["--runs", "0"], ["--runs", "at least 1"]),
        (["--dtype", "int8"], ["--dtype", "fp32"]),
        (["--device", "abacus"], ["--device", "cpu"]),
        (["--preset", "fastest"], ["--preset", "paper"]),
        (["--share", "0.5"], ["--share", "TOP_K"]),
        (["--top-k", "500"], ["--top-k", "16 tokens"]),
        (["--top-k", "1"], ["--top-k", "whole number from 2"]),
        (["--select-block", "3"], ["--select-block", "3 blocks"]),
        (["--sweep", "top_k=a"], ["--sweep", "select_block"]),
        (["--sweep", "alpha=1"], ["--sweep", "top_k"]),
        (["--sweep", "top_k"], ["--sweep", "top_k"]),
        (["--sweep", "top_k=4,alpha=1"], ["--sweep", "alpha"]),
        (["--sweep", "preset=fastest"], ["--preset", "paper"]),
        (["--sweep", "method=slow"], ["--method", "merging"]),
        (["--sweep", "top_k=4,500"], ["--top-k", "500"]),
        (["--json", "nowhere/bench.json"], ["--json", "does not exist"]),
        (["--plot", "speed.bmp"], ["--plot", ".svg"]),
        (["--plot", "speed.svg", "--train"], ["--plot", "--train"]),
        (["--compiled", "--train"], ["--compiled", "--train"]),
        (["--", "STAGES"], ["STAGES", "stands alone"]),
        (["--", "SPEED", "9"], ["SPEED", "TOP_K"]),
        (["--", "STAGES", "((0, 4),)"], ["--stages", "at most"]),
        (["--", "STAGES", "((2, 16),)"], ["--stages", "before the next"]),
    ],
)
def test_bad_input_is_one_clear_line(flags, names, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--backbone", SMALL, "--top-k", "8", *flags])
    error = capsys.readouterr().err.strip()
    assert end.value.code == 1 and "\n" not in error
    assert all(name in error for name in names), error


@pytest.mark.parametrize("share", [0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_the_bundled_tower_runs_the_very_blocks_and_tokens_that_a_share_places_in_a_vit_b(share):
    config = SpotlighterConfig(share=share)
    tower = accuracy.tower_of("ViT-B/16")
    placed = accuracy.on_bundled(config, tower)
    assert accuracy.config_of(placed).steps(accuracy.BUNDLED) == config.steps(tower)
