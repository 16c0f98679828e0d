"""PromptKD: a wider teacher, its checkpoint, distillation, and the classes that each split is tested on."""

import pytest
import torch
from hosts_kit import batch_of, losses_over, make_trainer
from random_clips import save_random_clip

from spotlighter_plugin.hosts.promptkd import classes_of_split, distillation_loss

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


def promptkd(folder, taught, *options):
    settings = ["TRAINER.PROMPTKD.PREC", "fp32", "TRAINER.PROMPTKD.KD_WEIGHT", 100.0, "TRAINER.MODAL", "cross"]
    teacher = ["TRAINER.PROMPTKD.TEACHER_NAME", taught[0], "TRAINER.PROMPTKD.TEACHER_CHECKPOINT", taught[1]]
    return make_trainer(folder, "PromptKD", "promptkd", *settings, *teacher, *options)


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
