"""PromptKD, alone and with Spotlighter: a wider teacher, distillation, the classes that each split is tested on; and
PromptSRC, which trains the teacher: its regularisers, its ensemble over the epochs."""

import pytest
import torch
from hosts_kit import batch_of, losses_over, make_trainer
from method_kit import save_random_clip

from spotlighter_plugin.hosts import adapter_for
from spotlighter_plugin.hosts.promptkd import classes_of_split, distillation_loss
from spotlighter_plugin.method.memory import GUESSED, UNJUDGED
from spotlighter_plugin.towers.clip import load_clip, tokenize
from spotlighter_plugin.towers.prompts import normalize
from trainers.promptsrc import ENSEMBLE, gaussian_weights

S = "TRAINER.SPOTLIGHTER."
TEACHER = {"seed": 3, "embed": 192, "vision": 192, "text": 128, "layers": 4}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A PromptSRC teacher of another width and its checkpoint: (backbone, checkpoint)."""
    folder = tmp_path_factory.mktemp("teacher")
    backbone = save_random_clip(folder / "teacher.safetensors", **TEACHER)
    trainer = make_trainer(
        folder, "PromptSRC", "promptsrc", "TRAINER.PROMPTSRC.PREC", "fp32", "OPTIM.MAX_EPOCH", 1,
        "TRAINER.PROMPTSRC.GPA_MEAN", 1, "TRAINER.PROMPTSRC.N_CTX_VISION", 3,
        "TRAINER.PROMPTSRC.PROMPT_DEPTH_TEXT", 2, backbone=backbone,
    )  # fmt: skip
    trainer.train()
    return backbone, str(folder / "out" / "VLPromptLearner" / "model.pth.tar-1"), trainer.model


def promptkd(folder, taught, *options, trainer="PromptKD"):
    settings = ["TRAINER.PROMPTKD.PREC", "fp32", "TRAINER.PROMPTKD.KD_WEIGHT", 100.0, "TRAINER.MODAL", "cross"]
    teacher = ["TRAINER.PROMPTKD.TEACHER_NAME", taught[0], "TRAINER.PROMPTKD.TEACHER_CHECKPOINT", taught[1]]
    module = "promptkd_spotlighter" if trainer.endswith("Spotlighter") else "promptkd"
    return make_trainer(folder, trainer, module, *settings, *teacher, *options)


def test_the_teacher_is_promptsrcs_model_again(tmp_path, taught):
    trainer = promptkd(tmp_path, taught)
    images = batch_of(trainer)["img"]
    with torch.no_grad():
        assert torch.equal(trainer.model_teacher(images), taught[2](images))
    assert not any(p.requires_grad for p in trainer.model_teacher.parameters())


def test_the_student_classifies_with_the_teachers_texts_at_the_teachers_width(tmp_path, taught):
    trainer = promptkd(tmp_path, taught)
    model, images = trainer.model, batch_of(trainer)["img"]
    assert model.encode_image(images).shape == (24, 192) and model.encode_text().shape == (6, 192)
    assert torch.equal(model.encode_text(), trainer.model_teacher.text_features())
    assert not any("teacher" in key for key in model.state_dict())


def test_texts_kept_while_training_under_amp_serve_evaluation_in_float32(tmp_path, taught):
    trainer = promptkd(tmp_path, taught, "TRAINER.PROMPTKD.PREC", "amp")
    losses_over(trainer, 1)
    trainer.set_model_mode("eval")
    images = batch_of(trainer)["img"]
    with torch.no_grad():
        logits = trainer.model_inference(images)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(trainer.model_teacher(images), taught[2](images))


def test_labels_are_never_looked_at(tmp_path, taught):
    trainer = promptkd(tmp_path, taught)
    images = batch_of(trainer)["img"]
    first, _ = trainer.objective(images, torch.zeros(24, dtype=torch.long))
    second, _ = trainer.objective(images, torch.full((24,), 5))
    assert torch.equal(first, second)


def test_the_loss_is_the_divergence_from_the_teacher():
    student, teacher = torch.randn(4, 5, dtype=torch.double), torch.randn(4, 5, dtype=torch.double)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    expected = sum(p[b, c] * (p[b, c] / q[b, c]).log() for b in range(4) for c in range(5)) * 4 / 20
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0), expected)
    assert distillation_loss(teacher, teacher, 1.0).abs() < 1e-12


def test_base2novel_tests_base_classes_in_val_and_the_others_in_test(tmp_path, taught):
    assert classes_of_split("base2novel", 7, "val") == slice(None, 4)
    assert classes_of_split("base2novel", 7, "test") == slice(4, None)
    assert classes_of_split("cross", 7, "test") == slice(None)
    trainer = promptkd(tmp_path, taught, "TRAINER.MODAL", "base2novel")
    images = batch_of(trainer)["img"]
    with torch.no_grad():
        everything = trainer.model.eval()(images)
        for trainer.split, part in (("val", everything[:, :3]), ("test", everything[:, 3:])):
            assert torch.equal(trainer.model_inference(images), part)


def test_a_run_saves_the_student_alone_and_loads_it(tmp_path, taught):
    trainer = promptkd(tmp_path, taught, "OPTIM.MAX_EPOCH", 1)
    trainer.train()
    path = tmp_path / "out" / "VLPromptLearner" / "model.pth.tar-1"
    keys = set(torch.load(path, weights_only=True)["state_dict"])
    assert {"VPT_image_trans.conv1.3.weight", "image_encoder.VPT", "VPT_image_trans.conv1.1.running_mean"} <= keys
    other = promptkd(tmp_path, taught, "OUTPUT_DIR", str(tmp_path / "other"))
    other.load_model(str(tmp_path / "out"), epoch=1)
    images = batch_of(trainer)["img"]
    with torch.no_grad():
        assert torch.equal(other.model.eval()(images), trainer.model.eval()(images))


def test_a_bad_teacher_is_one_line(tmp_path, taught):
    def refused(*options):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            promptkd(tmp_path, taught, *options)
        assert "\n" not in str(error.value)
        return str(error.value)

    name, checkpoint = "TRAINER.PROMPTKD.TEACHER_NAME", "TRAINER.PROMPTKD.TEACHER_CHECKPOINT"
    assert "--trainer PromptSRC" in refused(checkpoint, str(tmp_path / "nowhere"))
    assert "--trainer PromptSRC" in refused(checkpoint, "")
    narrower = save_random_clip(tmp_path / "narrow.safetensors")
    assert "prompt_learner.ctx of shape (4, 128), the model wants (4, 64)" in refused(name, narrower)
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "epoch": 1}, tmp_path / "other.pth.tar")
    assert "no checkpoint of PromptSRC" in refused(checkpoint, str(tmp_path / "other.pth.tar"))
    assert "base2novel, cross" in refused("TRAINER.MODAL", "sideways")
    assert "TEMPERATURE 0.0" in refused("TRAINER.PROMPTKD.TEMPERATURE", 0.0)


# ----------------------------------------------------------------------------------------------------- with Spotlighter


def with_plugin(folder, taught, *options):
    return promptkd(folder, taught, S + "TOP_K", 6, S + "SELECT_BLOCK", -1, *options, trainer="PromptKDSpotlighter")


def test_promptkds_bank_learns_the_teachers_labels_and_its_splits_have_their_classes(tmp_path, taught):
    trainer = with_plugin(tmp_path, taught, "TRAINER.MODAL", "base2novel", "TEST.NO_TEST", False)
    adapter, images = trainer.model.adapter, batch_of(trainer)["img"]
    wrong = torch.zeros(len(images), dtype=torch.long)
    with torch.no_grad():
        expected = trainer.model_teacher(images).argmax(1)
    assert torch.equal(adapter.assignment_labels(images, wrong), expected)
    trainer.set_model_mode("eval")
    with torch.no_grad():
        for trainer.split in ("val", "test"):
            assert trainer.model_inference(images).shape == (24, 3)


def test_promptkd_remembers_all_classes_by_the_teachers_labels_and_never_sees_a_test_image(tmp_path, taught, capsys):
    trainer = with_plugin(tmp_path, taught, "TRAINER.MODAL", "base2novel", S + "MATCH_SHOTS", 24)
    trainer.model.adapter.teacher_logits = lambda images: torch.eye(6)[images.mean((2, 3)).argmax(1)]  # reddest, …
    trainer._remember()
    counts = trainer.model.plugin.memory.counts  # (C,)
    shots = torch.cat([images for images, _ in map(trainer.parse_batch_test, trainer.shot_loader())])
    assert torch.equal(counts, shots.mean((2, 3)).argmax(1).bincount(minlength=6))  # labels would give 4 each
    trainer.val_loader = trainer.test_loader = None
    capsys.readouterr()
    trainer._remember()  # needs neither; the teacher's guesses do not judge what is filed under them
    assert trainer.model.plugin.memory.weight.tolist() == pytest.approx([UNJUDGED, GUESSED])
    assert "guessed labels cannot judge it" in capsys.readouterr().out


def test_promptkd_projects_tokens_as_it_projects_images(tmp_path, taught):
    trainer = with_plugin(tmp_path, taught)
    model = trainer.model.host.eval()
    features = torch.randn(5, 7, 64)
    with torch.no_grad():
        expected = model.VPT_image_trans(features.flatten(0, 1)).unflatten(0, (5, 7))
        torch.testing.assert_close(trainer.model.adapter.project(features), expected)


def test_promptkd_without_its_teacher_is_one_line(tmp_path, taught):
    model = promptkd(tmp_path, taught).model
    model.__dict__.pop("teacher")
    with pytest.raises(ValueError, match="teacher=model"):
        adapter_for(model)


# ---------------------------------------------------------------------------------- PromptSRC, which trains the teacher


OPTIONS = ("TRAINER.PROMPTSRC.PREC", "fp32", "TRAINER.PROMPTSRC.GPA_MEAN", 1, "OPTIM.LR", 0.01)


def promptsrc(folder, *options):
    return make_trainer(folder, "PromptSRC", "promptsrc", *OPTIONS, *options)


def test_the_regularisers_pull_towards_frozen_clip(tmp_path):
    trainer = promptsrc(tmp_path)
    clip_model, images = load_clip(trainer.cfg.MODEL.BACKBONE.NAME), batch_of(trainer)["img"]
    seen = []
    trainer.model.image_encoder.register_forward_hook(lambda module, args, output: seen.append(output))
    names = [name.replace("_", " ") for name in trainer.dm.dataset.classnames]
    with torch.no_grad():
        trainer.objective(images, torch.zeros(len(images), dtype=torch.long))
        by_template = torch.stack([clip_model.encode_text(tokenize([t.format(n) for n in names])) for t in ENSEMBLE])
        torch.testing.assert_close(trainer.frozen_text(), normalize(by_template.mean(0)), atol=1e-5, rtol=0)
        frozen = clip_model.encode_image(images)
    assert torch.equal(seen[1], frozen) and not torch.equal(seen[0], frozen)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "amp"])
def test_the_loss_falls_and_only_prompts_change(tmp_path, precision):
    trainer = promptsrc(tmp_path, "TRAINER.PROMPTSRC.PREC", precision)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    losses = losses_over(trainer, 4)
    assert losses[-1] < losses[0]
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "VPT" in name or name == "prompt_learner.ctx"}
    assert {"image_encoder.VPT", "text_encoder.transformer.resblocks.2.VPT_shallow"} <= changed


def test_the_final_prompts_are_the_weighted_mean_over_the_epochs(tmp_path):
    trainer = promptsrc(tmp_path, "OPTIM.MAX_EPOCH", 3, "TRAINER.PROMPTSRC.GPA_MEAN", 2)
    weights = gaussian_weights(3, trainer.host_options)
    assert sum(weights) == pytest.approx(1) and weights[1] == max(weights)
    history = []
    add = trainer.ensemble.add
    trainer.ensemble.add = lambda model, epoch: (history.append(model.prompt_learner.ctx.clone()), add(model, epoch))
    trainer.train()
    expected = sum(weight * ctx for weight, ctx in zip(weights, history, strict=True))
    torch.testing.assert_close(trainer.model.prompt_learner.ctx, expected)
    assert not torch.equal(history[-1], expected)


def test_the_ensemble_survives_an_interruption(tmp_path):
    options = ("OPTIM.MAX_EPOCH", 3, "TRAIN.CHECKPOINT_FREQ", 1)
    whole = promptsrc(tmp_path, *options)
    whole.train()
    short = promptsrc(tmp_path, *options, "OUTPUT_DIR", str(tmp_path / "again"))
    short.max_epoch = 2  # stops as if killed: the schedule and the ensemble are for three
    short.ensemble.write_into = lambda model: None
    short.train()
    resumed = promptsrc(tmp_path, *options, "OUTPUT_DIR", str(tmp_path / "again"))
    assert not any(value.any() for value in resumed.ensemble.state_dict().values())
    resumed.train()
    assert resumed.start_epoch == 2
    torch.testing.assert_close(resumed.model.prompt_learner.ctx, whole.model.prompt_learner.ctx)


def test_an_ensemble_without_weight_is_refused(tmp_path):
    with pytest.raises(ValueError, match="GPA_MEAN 500 is too far") as error:
        promptsrc(tmp_path, "TRAINER.PROMPTSRC.GPA_MEAN", 500)
    assert "\n" not in str(error.value)
