"""What is peculiar to PromptKD and to MaPLe's fork with Spotlighter."""

import pytest
import torch
from hosts_kit import batch_of, make_trainer, train_teacher

from spotlighter_plugin.hosts import adapter_for
from spotlighter_plugin.hosts.maple import MaPLeAdapter
from spotlighter_plugin.method.memory import UNJUDGED

S = "TRAINER.SPOTLIGHTER."
OPTIONS = {
    "MaPLe": ["TRAINER.MAPLE.PREC", "fp32", "OPTIM.LR", 0.005],
    "PromptKD": ["TRAINER.PROMPTKD.PREC", "fp32", "OPTIM.LR", 0.002, "TRAINER.PROMPTKD.KD_WEIGHT", 100.0]
    + ["TRAINER.MODAL", "cross"],
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Options that name a PromptSRC teacher of another width."""
    return train_teacher(tmp_path_factory.mktemp("teacher"))


def make(folder, host, teacher, *options, plugin=True):
    trainer, module = (f"{host}Spotlighter", f"{host.lower()}_spotlighter") if plugin else (host, host.lower())
    needed = teacher if host == "PromptKD" else []
    selection = [S + "TOP_K", 6, S + "SELECT_BLOCK", -1] if plugin else []
    return make_trainer(folder, trainer, module, *OPTIONS[host], *needed, *selection, *options)


def test_promptkds_bank_learns_the_teachers_labels_and_its_splits_have_their_classes(tmp_path, teacher):
    trainer = make(tmp_path, "PromptKD", teacher, "TRAINER.MODAL", "base2novel", "TEST.NO_TEST", False)
    adapter, images = trainer.model.adapter, batch_of(trainer)["img"]
    wrong = torch.zeros(len(images), dtype=torch.long)
    with torch.no_grad():
        expected = trainer.model_teacher(images).argmax(1)
    assert torch.equal(adapter.assignment_labels(images, wrong), expected)
    trainer.set_model_mode("eval")
    with torch.no_grad():
        for trainer.split in ("val", "test"):
            assert trainer.model_inference(images).shape == (24, 3)


def test_promptkd_remembers_all_classes_by_the_teachers_labels_and_never_sees_a_test_image(tmp_path, teacher, capsys):
    trainer = make(tmp_path, "PromptKD", teacher, "TRAINER.MODAL", "base2novel", S + "MATCH_SHOTS", 24)
    trainer.model.adapter.teacher_logits = lambda images: torch.eye(6)[images.mean((2, 3)).argmax(1)]  # reddest, …
    trainer._remember()
    counts = trainer.model.plugin.memory.counts  # (C,)
    shots = torch.cat([images for images, _ in map(trainer.parse_batch_test, trainer.shot_loader())])
    assert torch.equal(counts, shots.mean((2, 3)).argmax(1).bincount(minlength=6))  # labels would give 4 each
    trainer.val_loader = trainer.test_loader = None
    capsys.readouterr()
    trainer._remember()  # needs neither; the teacher's guesses do not judge what is filed under them
    assert (trainer.model.plugin.memory.weight == UNJUDGED).all()
    assert "guessed labels cannot judge it" in capsys.readouterr().out


def test_promptkd_projects_tokens_as_it_projects_images(tmp_path, teacher):
    trainer = make(tmp_path, "PromptKD", teacher)
    model = trainer.model.host.eval()
    features = torch.randn(5, 7, 64)
    with torch.no_grad():
        expected = model.VPT_image_trans(features.flatten(0, 1)).unflatten(0, (5, 7))
        torch.testing.assert_close(trainer.model.adapter.project(features), expected)


def test_promptkd_without_its_teacher_is_one_line(tmp_path, teacher):
    model = make(tmp_path, "PromptKD", teacher, plugin=False).model
    model.__dict__.pop("teacher")
    with pytest.raises(ValueError, match="teacher=model"):
        adapter_for(model)


class ForkedMaPLe(torch.nn.Module):
    """MaPLe as its fork has it: the towers are called with their prompts."""

    def __init__(self, ours):
        super().__init__()
        self.prompt_learner, self.tokenized_prompts = ours.prompt_learner, ours.tokenized_prompts
        self.logit_scale, self.dtype, self.ours = ours.logit_scale, ours.dtype, ours
        self.text_encoder = lambda prompts, ids, deep: ours.text_encoder(prompts, ids) * (len(deep) == 2)
        self.image_encoder = lambda images, first, deep: ours.encode_image(images) * (len(first) == len(deep) == 2)


@torch.no_grad()
def test_the_forks_maple_is_called_its_own_way(tmp_path):
    ours = make(tmp_path, "MaPLe", None, plugin=False).model
    adapter, images = MaPLeAdapter(ForkedMaPLe(ours)), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(adapter.encode_text(), ours.encode_text(), atol=1e-5, rtol=1e-4)
    assert torch.equal(adapter.encode_image(images), ours.encode_image(images))
    assert type(adapter_for(ForkedMaPLe(ours))) is MaPLeAdapter
