"""CoOpSpotlighter as a Dassl trainer: trains, saves, resumes, loads across classes and from a plain host."""

import pytest
import torch
from dassl.engine import build_trainer
from hosts_kit import losses_over, make_cfg, make_trainer
from method_kit import CLASS_NAMES

import trainers.coop as coop_module
from spotlighter_plugin import config
from spotlighter_plugin.method.memory import UNJUDGED

S = "TRAINER.SPOTLIGHTER."


@pytest.fixture
def options(monkeypatch):
    """Let hosts_kit build CoOpSpotlighter: its options are CoOp's and the plug-in's."""
    import trainers.coop_spotlighter as module

    def extend_cfg(cfg):
        coop_module.extend_cfg(cfg)
        config.extend_cfg(cfg)

    monkeypatch.setattr(module, "extend_cfg", extend_cfg, raising=False)
    return ["TRAINER.COOP.PREC", "fp32", "TRAINER.COOP.N_CTX", 4, S + "TOP_K", 6, S + "SELECT_BLOCK", -1]


def spotlighter(folder, options, *more):
    return make_trainer(folder, "CoOpSpotlighter", "coop_spotlighter", *options, *more)


def state_of(trainer):
    return {
        f"{name}.{key}": value.clone()
        for name in trainer.get_model_names()
        for key, value in trainer._models[name].state_dict().items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_count_of_added_parameters_is_printed(tmp_path, options, capsys):
    trainer = spotlighter(tmp_path, options, S + "MAPPING", "linear+linear")
    assert trainer.model.extra_parameter_count() == 8256  # 2 · 64 · 64 + 64
    assert "Spotlighter adds 8,256 trainable parameters (mapping: linear+linear)" in capsys.readouterr().out


def test_losses_that_reach_nothing_are_named_once(tmp_path, options, capsys):
    trainer = spotlighter(tmp_path, options, S + "PROTOTYPE_LOGITS", False, S + "LOSSES", "kl_visual")
    trainer.train()
    assert capsys.readouterr().out.count("Left out, because nothing that is trained changes them: kl_visual") == 1


@pytest.mark.parametrize("precision", ["fp32", "fp16", "amp"])
@pytest.mark.parametrize("preset", ["paper", "default"])
def test_the_loss_falls_in_every_precision(tmp_path, options, preset, precision):
    trainer = spotlighter(tmp_path, options, S + "PRESET", preset, "TRAINER.COOP.PREC", precision, "OPTIM.LR", 0.005)
    trainer.before_train()  # the hand-written prompts: with λ2 = 20 their distance rises from 0 otherwise
    losses = losses_over(trainer, 5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does_bank_included(tmp_path, options, preset):
    options = [*options, S + "PRESET", preset, "TRAIN.CHECKPOINT_FREQ", 1]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = spotlighter(tmp_path / "a", options)
    whole.train()
    first = spotlighter(tmp_path / "b", options)
    stop = first.after_epoch

    def stop_after_one():
        stop()
        raise KeyboardInterrupt

    first.after_epoch = stop_after_one
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = spotlighter(tmp_path / "b", options)
    torch.manual_seed(123)  # whatever happened in between
    second.train()
    assert second.start_epoch == 1
    assert same(state_of(second), state_of(whole))


def test_the_hand_written_prompts_of_the_frozen_clip_are_the_reference_of_the_text_losses(tmp_path, options):
    from spotlighter_plugin.towers.clip import encode_prompts, load_clip

    trainer = spotlighter(tmp_path, options, S + "LOSSES", "reg_text")
    trainer.train()
    clip_model = load_clip(trainer.cfg.MODEL.BACKBONE.NAME)
    expected = encode_prompts(clip_model, [f"a photo of a {name}." for name in CLASS_NAMES])
    torch.testing.assert_close(trainer.model.adapter.frozen_text(), expected)


def test_the_plug_ins_learning_rate_is_a_multiple_of_the_hosts_and_the_hosts_is_untouched(tmp_path, options):
    trainer = spotlighter(tmp_path, options, S + "LR_MULTIPLIER", 3.0, S + "MAPPING", "full")
    rates = [trainer._optims[name].param_groups[0]["lr"] for name in trainer.get_model_names()]
    assert rates[1] == pytest.approx(3 * rates[0])
    assert {id(p) for p in trainer._optims["prompt_learner"].param_groups[0]["params"]} == {
        id(trainer.model.host.prompt_learner.ctx)
    }


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("TOP_K", 17, "16 tokens"), ("SELECT_BLOCK", 9, "3 blocks"), ("MAPPING", "conv", "full"), ("BETA", 2, "0 to 1")],
)
def test_a_wrong_option_stops_the_trainer_with_one_line(tmp_path, options, option, value, words):
    cfg = make_cfg(tmp_path, "CoOpSpotlighter", "coop_spotlighter", *options, S + option, value)
    with pytest.raises(ValueError, match=words) as error:
        build_trainer(cfg)
    assert f"{S}{option} = {value!r}" in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_of_another_backbones_width_is_one_clear_line(tmp_path, options):
    from method_kit import save_random_clip

    trainer = spotlighter(tmp_path, options)
    trainer.train()
    narrow = save_random_clip(tmp_path / "narrow.safetensors", vision=64)
    other = make_trainer(tmp_path, "CoOpSpotlighter", "coop_spotlighter", *options, backbone=narrow)
    with pytest.raises(ValueError, match="MODEL.BACKBONE.NAME") as error:
        other.load_model(trainer.output_dir, epoch=2)
    assert "\n" not in str(error.value)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, options):
    trainer = spotlighter(tmp_path, options)
    trainer.model.host.prompt_learner.ctx.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        trainer.train()


def test_the_memory_learns_from_the_shots_alone_and_says_what_it_chose(tmp_path, options, monkeypatch, capsys):
    trainer = spotlighter(tmp_path, options)
    seen, remember = [], trainer.model.remember
    monkeypatch.setattr(trainer.model, "remember", lambda batches: remember([seen.append(b) or b for b in batches]))
    trainer.train()
    assert sum(len(labels) for _, labels in seen) == len(trainer.dm.dataset.train_x) == 24
    assert trainer.model.plugin.memory.counts.tolist() == [4] * 6
    assert f"Memory of 24 shots: {trainer.model.plugin.memory.choice.describe()}" in capsys.readouterr().out


def test_a_memory_that_nothing_can_weigh_says_little_and_that_nothing_could(tmp_path, options, monkeypatch, capsys):
    trainer = spotlighter(tmp_path, options, "OPTIM.MAX_EPOCH", 1)
    trainer.val_loader = None
    shots = trainer.dm.dataset.train_x
    monkeypatch.setattr(trainer.dm.dataset, "_train_x", [shots[i] for i in range(0, len(shots), 4)])
    trainer.train()
    found = trainer.model.plugin.memory.weight.tolist()  # beside classes that nobody has shown, and without such
    assert found == pytest.approx([UNJUDGED / 4, UNJUDGED])
    assert "since fewer than three shots a class cannot judge it" in capsys.readouterr().out


def test_a_checkpoint_in_the_middle_of_training_says_that_it_remembers_nothing(tmp_path, options, capsys):
    trainer = spotlighter(tmp_path, options, "OPTIM.MAX_EPOCH", 2, "TRAIN.CHECKPOINT_FREQ", 0)
    trainer.train()
    for epoch, is_said in ((1, True), (2, False)):
        capsys.readouterr()
        trainer.load_model(trainer.output_dir, epoch)
        assert ("remembers no shots" in capsys.readouterr().out) == is_said


def test_a_trained_host_remembers_its_shots_without_training_and_serves_new_classes(tmp_path, options, capsys):
    def made(name, trainer, classes):
        module = "coop_spotlighter" if trainer.endswith("Spotlighter") else "coop"
        given = options if module == "coop_spotlighter" else options[:4]
        folder = "OUTPUT_DIR", str(tmp_path / name), "DATASET.SUBSAMPLE_CLASSES", classes
        return make_trainer(tmp_path, trainer, module, *given, *folder)

    host = made("host", "CoOp", "base")
    host.train()
    (tmp_path / "host/log.txt").write_text(f"** Config **\n************\n{host.cfg}\n")
    new = made("new", "CoOpSpotlighter", "new")
    new.load_model(host.output_dir, epoch=2)
    assert "nothing is remembered" in capsys.readouterr().out and not new.model.plugin.memory.is_ready
    base = made("base", "CoOpSpotlighter", "base")
    base.load_model(host.output_dir, epoch=2)
    assert "Memory of 12 shots" in capsys.readouterr().out
    assert torch.equal(base.model.host.prompt_learner.ctx, host.model.prompt_learner.ctx)
    new.load_model(base.output_dir, epoch=2)
    assert same(state_of(new), state_of(base) | {k: v for k, v in state_of(new).items() if "token_" in k})
    assert new.model.plugin.memory.class_names == base.model.class_names != new.model.class_names


def test_of_a_large_training_set_a_fixed_sample_of_twice_what_the_memory_holds_is_looked_at(tmp_path, options):
    trainer = spotlighter(tmp_path, options, "TRAINER.SPOTLIGHTER.MATCH_SHOTS", 1)
    seen = [[path for batch in trainer.shot_loader() for path in batch["impath"]] for _ in range(2)]
    every = [item.impath for item in trainer.dm.dataset.train_x]
    assert len(every) == 24 and len(set(seen[0])) == 12 and set(seen[0]) <= set(every)
    assert seen[0] == seen[1]


def test_models_are_compared_on_validation_with_the_memory_which_is_made_once_an_epoch(tmp_path, options, monkeypatch):
    options = [*options, "TEST.NO_TEST", False, "TEST.FINAL_MODEL", "best_val", "OPTIM.MAX_EPOCH", 2]
    trainer = spotlighter(tmp_path, options)
    events, remember, test = [], trainer._remember, trainer.test
    monkeypatch.setattr(trainer, "_remember", lambda: (events.append("remember"), remember()))
    monkeypatch.setattr(trainer, "test", lambda split=None: (events.append(split or "test"), test(split))[1])
    trainer.train()
    assert events == ["remember", "val", "remember", "val", "test"]
