"""Every host with Spotlighter: what is the host's stays the host's, and both train together."""

import pytest
import torch
from hosts_kit import batch_of, losses_over, make_trainer, train_teacher

from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper
from spotlighter_plugin.hosts import adapter_for
from spotlighter_plugin.hosts.maple import MaPLeAdapter

S = "TRAINER.SPOTLIGHTER."
OPTIONS = {
    "MaPLe": ["TRAINER.MAPLE.PREC", "fp32", "OPTIM.LR", 0.005],
    "CLIPFit": ["TRAINER.CLIPFIT.PREC", "fp32", "OPTIM.LR", 0.002],
    "PromptKD": ["TRAINER.PROMPTKD.PREC", "fp32", "OPTIM.LR", 0.002, "TRAINER.PROMPTKD.KD_WEIGHT", 100.0]
    + ["TRAINER.MODAL", "cross"],
}
TRAINED_IN_THE_TOWER = {"MaPLe": "prompt_learner", "CLIPFit": "image_encoder", "PromptKD": "image_encoder"}
hosts = pytest.mark.parametrize("host", list(OPTIONS))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Options that name a PromptSRC teacher of another width."""
    return train_teacher(tmp_path_factory.mktemp("teacher"))


def make(folder, host, teacher, *options, plugin=True):
    trainer, module = (f"{host}Spotlighter", f"{host.lower()}_spotlighter") if plugin else (host, host.lower())
    needed = teacher if host == "PromptKD" else []
    selection = [S + "TOP_K", 6, S + "SELECT_BLOCK", -1] if plugin else []
    return make_trainer(folder, trainer, module, *OPTIONS[host], *needed, *selection, *options)


def host_logits(trainer, images):
    model = trainer.model.host if hasattr(trainer.model, "host") else trainer.model
    model.eval()
    with torch.no_grad():
        return model(images)


@hosts
def test_a_detached_host_gives_its_own_logits_and_state_bit_for_bit(tmp_path, teacher, host):
    plain = make(tmp_path, host, teacher, plugin=False).model.eval()
    images = torch.randn(3, 3, 32, 32)
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    with torch.no_grad():
        before = plain(images)
        wrapper = SpotlighterWrapper(plain, SpotlighterConfig(top_k=4, select_block=1))
        assert torch.equal(plain(images), before)
        assert not torch.equal(wrapper(images), before)
        assert wrapper.detach() is plain
        assert torch.equal(plain(images), before)
    assert plain.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())


@hosts
@pytest.mark.parametrize("mapping", ["none", "full"])
def test_with_every_token_kept_the_logits_are_the_hosts(tmp_path, teacher, host, mapping):
    plain = make(tmp_path, host, teacher, plugin=False).model.eval()
    images = torch.randn(3, 3, 32, 32)
    config = SpotlighterConfig(top_k=16, select_block=1, mapping=mapping, prototypes_in="none")
    with torch.no_grad():
        expected = plain(images)
        logits = SpotlighterWrapper(plain, config).eval()(images)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@hosts
def test_several_cuts_and_fused_tokens_give_the_host_with_every_token_and_its_prompts_with_few(tmp_path, teacher, host):
    plain = make(tmp_path, host, teacher, plugin=False).model.eval()
    images = torch.randn(3, 3, 32, 32)
    options = {"select_block": -1, "mapping": "none", "prototype_logits": False, "fuse_dropped": True}
    with torch.no_grad():
        expected, lengths = plain(images), []
        wrapper = SpotlighterWrapper(plain, SpotlighterConfig(stages=((0, 16), (1, 16)), top_k=16, **options)).eval()
        torch.testing.assert_close(wrapper(images), expected, atol=1e-4, rtol=1e-4)
        wrapper.detach()
        wrapper = SpotlighterWrapper(plain, SpotlighterConfig(stages=((0, 9), (1, 7)), top_k=4, **options)).eval()
        for block in wrapper.stream.vision.transformer.resblocks:
            block.attn.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[0]))
        wrapper(images)
    prompts = 0 if host == "CLIPFit" else lengths[0] - (1 + 9 + 1)
    assert lengths == [1 + k + 1 + prompts for k in (9, 7, 4)] and (host == "CLIPFit" or prompts > 0)
    wrapper.detach()
    with torch.no_grad():
        assert torch.equal(plain(images), expected)


@hosts
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_the_loss_falls_and_what_the_host_freezes_stays(tmp_path, teacher, host, preset):
    trainer = make(tmp_path, host, teacher, S + "PRESET", preset)
    model = trainer.model.host
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = losses_over(trainer, 8, "cls")  # the host's own objective, on Spotlighter's logits
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name
    assert any(p.requires_grad and not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert trainer.model.plugin.bank.filled.any()


@hosts
def test_the_gradient_passes_through_selection_into_the_tower(tmp_path, teacher, host):
    trainer = make(tmp_path, host, teacher)
    trainer.set_model_mode("train")
    batch = batch_of(trainer)
    trainer.model(batch["img"], batch["label"])["loss"].backward()
    trained = {n: p for n, p in trainer.model.host.named_parameters() if p.requires_grad}
    tower = {n: p for n, p in trained.items() if TRAINED_IN_THE_TOWER[host] in n}
    assert len(tower) >= 3
    unreached = [name for name, p in tower.items() if p.grad is None or not p.grad.any()]
    assert not unreached


@hosts
def test_a_hosts_checkpoint_from_before_loads_and_its_keys_stay(tmp_path, teacher, host):
    plain = make(tmp_path, host, teacher, "OPTIM.MAX_EPOCH", 1, plugin=False)
    plain.train()
    trainer = make(tmp_path, host, teacher, "OUTPUT_DIR", str(tmp_path / "with"))
    trainer.load_model(str(tmp_path / "out"), epoch=1)
    images = batch_of(plain)["img"]
    assert torch.equal(host_logits(trainer, images), host_logits(plain, images))
    saved, loaded = (t._models[t.checkpoint].state_dict() for t in (plain, trainer))
    assert saved.keys() == loaded.keys()


@hosts
def test_a_run_trains_tests_saves_and_loads_whole(tmp_path, teacher, host):
    trainer = make(tmp_path, host, teacher, "OPTIM.MAX_EPOCH", 1, "TEST.NO_TEST", False)
    trainer.train()
    again = make(tmp_path, host, teacher, "OUTPUT_DIR", str(tmp_path / "again"))
    again.load_model(str(tmp_path / "out"), epoch=1)
    images = batch_of(trainer)["img"]
    with torch.no_grad():
        assert torch.equal(again.model.eval()(images), trainer.model.eval()(images))


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
    filled = trainer.model.plugin.memory.filled.sum(1)  # (C,)
    shots = torch.cat([images for images, _ in map(trainer.parse_batch_test, trainer.shot_loader())])
    assert torch.equal(filled, shots.mean((2, 3)).argmax(1).bincount(minlength=6))  # labels would give 4 each
    trainer.val_loader = trainer.test_loader = None
    trainer.model.plugin.memory.weight.zero_()
    capsys.readouterr()
    trainer._remember()  # needs neither; the teacher's labels do not judge the match with what is filed under them
    assert trainer.model.plugin.memory.weight > 0
    assert "25% of what the texts say" in capsys.readouterr().out


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
    assert torch.equal(adapter.encode_text(), ours.encode_text())
    assert torch.equal(adapter.encode_image(images), ours.encode_image(images))
    assert type(adapter_for(ForkedMaPLe(ours))) is MaPLeAdapter
