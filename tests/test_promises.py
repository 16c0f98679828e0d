"""What is promised of every host: attached, detached, trained, saved and loaded, with the plug-in and without."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hosts_kit import batch_of, losses_over, make_trainer, train_teacher
from method_kit import CLASS_NAMES, random_clip, some_images
from torch.nn import functional as F

from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper
from spotlighter_plugin.hosts import adapter_for
from spotlighter_plugin.towers.clip import tokenize

S = "TRAINER.SPOTLIGHTER."
ALL, BLOCKS = 16, 3  # patch tokens and blocks of the small tower
TRAINERS = Path(__file__).resolve().parents[1] / "trainers"


@dataclass(frozen=True)
class Host:
    """A row of the table: its options, which parameters it trains, and which of these reach the image tower.

    idle: trained, but taken away again by what comes after.
    node: where its PREC is. own_step: Spotlighter is attached to what its own step has trained, through the generic
    adapter.
    """

    options: list
    trains: str
    in_the_tower: str = ""
    idle: str = "nothing"
    prompts: int = 0
    node: str = ""
    own_step: bool = False


HOSTS = {
    "CoOp": Host(["TRAINER.COOP.N_CTX", 4], r"^prompt_learner\.ctx$"),
    "MaPLe": Host(["OPTIM.LR", 0.005], r"^prompt_learner\.", "prompt_learner", prompts=2),
    "CLIPFit": Host(
        ["OPTIM.LR", 0.002],
        r"text_encoder\.transformer\.resblocks\.\d\.mlp\.c_proj\.bias$|image_encoder\.(.*\.)?ln_\w+\.(weight|bias)$",
        "image_encoder",
    ),
    "PromptKD": Host(
        ["OPTIM.LR", 0.002, "TRAINER.PROMPTKD.KD_WEIGHT", 100.0, "TRAINER.MODAL", "cross"],
        "VPT",
        "image_encoder",
        idle=r"VPT_image_trans\.conv1\.0\.bias",  # the normalization behind it takes it away again
        prompts=4,
    ),
    "KgCoOp": Host(["TRAINER.COOP.N_CTX", 4], r"^prompt_learner\.ctx$", node="COOP"),
    "CoCoOp": Host(["TRAINER.COCOOP.N_CTX", 4], r"^prompt_learner\.(ctx$|meta_net)", own_step=True),
    "MMRL": Host(
        ["OPTIM.NAME", "adamw", "OPTIM.LR", 0.002],
        r"^representation_learner\.|^image_encoder\.proj_rep$",
        prompts=5,
        own_step=True,
    ),
}
hosts = pytest.mark.parametrize("host", list(HOSTS))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Options that name a PromptSRC teacher of another width."""
    return train_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def make(tmp_path, teacher):
    def make(host, *options, plugin=True, precision="fp32"):
        name, module = (f"{host}Spotlighter", f"{host.lower()}_spotlighter") if plugin else (host, host.lower())
        node = HOSTS[host].node or host.upper()
        needed = [*HOSTS[host].options, f"TRAINER.{node}.PREC", precision, *(teacher * (host == "PromptKD"))]
        selection = [S + "TOP_K", 6, S + "SELECT_BLOCK", -1] if plugin else []
        return make_trainer(tmp_path, name, module, *needed, *selection, *options)

    return make


@pytest.fixture(params=[*HOSTS, "CLIP"])
def model(request, make):
    """(name, model of a host that is not attached, its own logits of images, class names to attach it with)."""
    if request.param == "CLIP":
        clip_model = random_clip()
        tokens = tokenize([f"a photo of a {name}." for name in CLASS_NAMES])

        def logits(images):
            image, text = clip_model.encode_image(images), clip_model.encode_text(tokens)
            return clip_model.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T

        return request.param, clip_model, logits, CLASS_NAMES
    plain = make(request.param, plugin=False).model.eval()
    return request.param, plain, plain, CLASS_NAMES if HOSTS[request.param].own_step else None


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits_of(trainer, images):
    trainer.set_model_mode("eval")
    with torch.no_grad():
        return trainer.model_inference(images)


def test_every_trainer_with_the_plug_in_stands_in_this_table():
    files = "".join(path.read_text() for path in TRAINERS.glob("*.py"))
    assert set(re.findall(r"^class (\w+)Spotlighter\(", files, re.M)) == set(HOSTS)


# ------------------------------------------------------------------------------------------------- attach and detach


@pytest.mark.parametrize("options", [{"select_block": 1}, {"stages": ((0, 9), (1, 7)), "fuse_dropped": True}], ids=str)
def test_attached_and_detached_the_host_gives_its_own_logits_and_state_bit_for_bit(model, options):
    _, plain, logits, names = model
    images, state, hooks = some_images(), state_of(plain), hooks_of(plain)
    with torch.no_grad():
        before = logits(images)
        wrapper = SpotlighterWrapper(plain, SpotlighterConfig(top_k=4, **options), class_names=names).eval()
        assert torch.equal(logits(images), before)  # called directly, the host selects nothing
        assert not torch.equal(wrapper(images), before)
        assert torch.equal(logits(images), before)
        assert wrapper.detach() is plain
        assert torch.equal(logits(images), before)
    assert same(state_of(plain), state) and hooks_of(plain) == hooks


@pytest.mark.parametrize(
    "options",
    [
        {"select_block": 1, "mapping": "none"},
        {"select_block": 1, "mapping": "full"},
        {"select_block": -1, "mapping": "none", "stages": ((0, ALL), (1, ALL)), "fuse_dropped": True},
    ],
    ids=["none", "full", "three cuts"],
)
def test_with_every_token_kept_the_logits_are_the_hosts(model, options):
    name, plain, logits, names = model
    if name in HOSTS and HOSTS[name].own_step:
        options = {**options, "mapping": "none"}  # it keeps its own logits, which a mapping would replace
    config = SpotlighterConfig(top_k=ALL, prototypes_in="none", **options)
    with torch.no_grad():
        expected = logits(some_images())
        found = SpotlighterWrapper(plain, config, class_names=names).eval()(some_images())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_blocks_run_on_what_the_cuts_before_them_left_and_on_the_hosts_prompts(model):
    name, plain, _, names = model
    options = {"select_block": -1, "stages": ((0, 9), (1, 7)), "fuse_dropped": True, "prototype_logits": False}
    wrapper = SpotlighterWrapper(plain, SpotlighterConfig(top_k=4, **options), class_names=names).eval()
    lengths, prompts = [], HOSTS[name].prompts if name in HOSTS else 0
    for block in wrapper.stream.vision.transformer.resblocks:
        block.attn.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[0]))
    with torch.no_grad():
        wrapper(some_images())
    assert lengths == [1 + k + 1 + prompts for k in (9, 7, 4)]


@hosts
def test_a_host_is_recognised_by_what_it_has(make, host):
    model, own_step = make(host, plugin=False).model, HOSTS[host].own_step
    adapter = adapter_for(model, CLASS_NAMES if own_step else None)
    assert adapter.name == ("generic" if own_step else host)
    assert adapter.n_classes == 6 and adapter.vision is model.image_encoder


# -------------------------------------------------------------------------------------------------------------- train


@hosts
@pytest.mark.parametrize("precision", ["fp32", "fp16", "amp"])
def test_a_host_alone_learns_and_only_what_it_trains_changes(make, host, precision):
    trainer = make(host, plugin=False, precision=precision)
    changed, trained = learns(trainer, trainer.model, "loss", 5), trained_names(host, trainer.model)
    assert changed <= trained and all(re.search(HOSTS[host].idle, name) for name in trained - changed)


@hosts
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_with_the_plug_in_the_host_learns_and_what_it_freezes_stays_bit_for_bit(make, host, preset):
    if HOSTS[host].own_step and preset == "paper":
        with pytest.raises(ValueError, match="keeps its own logits, which a mapping would replace"):
            make(host, S + "PRESET", preset)
        return
    trainer = make(host, S + "PRESET", preset)
    model, part = trainer.spotlighter.host, "loss" if HOSTS[host].own_step else "cls"
    changed = learns(trainer, model, part, 8)  # the host's own objective; "cls": on Spotlighter's logits
    assert changed and changed <= trained_names(host, model)
    bank = trainer.spotlighter.plugin.bank
    assert bank.filled.any() if preset == "paper" else bank is None  # nothing reads it


def learns(trainer, model, part, steps):
    """Names of the parameters that a few steps change; the loss falls."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = losses_over(trainer, steps, part)
    assert losses[-1] < losses[0]
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def trained_names(host, model):
    return {name for name, _ in model.named_parameters() if re.search(HOSTS[host].trains, name)}


@pytest.mark.parametrize("host", [host for host, row in HOSTS.items() if row.in_the_tower])
def test_the_gradient_passes_through_selection_into_the_tower(make, host):
    trainer = make(host)
    trainer.set_model_mode("train")
    batch = batch_of(trainer)
    trainer.model(batch["img"], batch["label"])["loss"].backward()
    trained = {n: p for n, p in trainer.model.host.named_parameters() if p.requires_grad}
    tower = {n: p for n, p in trained.items() if HOSTS[host].in_the_tower in n}
    assert len(tower) >= 3
    assert not [name for name, p in tower.items() if p.grad is None or not p.grad.any()]


# ------------------------------------------------------------------------------------------------------- save and load


@hosts
def test_a_run_trains_tests_saves_and_loads_whole(make, tmp_path, host):
    trainer = make(host, "OPTIM.MAX_EPOCH", 1, "TEST.NO_TEST", False)
    trainer.train()
    again = make(host, "OUTPUT_DIR", str(tmp_path / "again"))
    again.load_model(str(tmp_path / "out"), epoch=1)
    images = batch_of(trainer)["img"]
    assert torch.equal(logits_of(again, images), logits_of(trainer, images))
    assert same(state_of(again.spotlighter.plugin), state_of(trainer.spotlighter.plugin))


@hosts
@pytest.mark.parametrize("plugin", [False, True], ids=["alone", "with the plug-in"])
def test_a_run_loads_into_other_class_names_and_keeps_its_own(make, tmp_path, host, plugin):
    trainer = make(host, "DATASET.SUBSAMPLE_CLASSES", "base", "OPTIM.MAX_EPOCH", 1, plugin=plugin)
    trainer.train()
    there = str(tmp_path / "other")
    other = make(host, "DATASET.SUBSAMPLE_CLASSES", "new", "OUTPUT_DIR", there, plugin=plugin)
    model, source = (t.spotlighter.host if plugin else t.model for t in (other, trainer))
    of_names = "token_|text_features|prompt_embeddings|entering"
    own = {name: each.clone() for name, each in model.named_buffers() if re.search(of_names, name)}
    assert own or host == "PromptKD"  # whose texts are its teacher's
    other.load_model(str(tmp_path / "out"), epoch=1)
    learned = dict(source.named_parameters())
    for name in trained_names(host, model):
        assert torch.equal(model.get_parameter(name), learned[name]), name
    assert logits_of(other, batch_of(other)["img"]).shape == (12, 3)
    assert all(torch.equal(model.get_buffer(name), value) for name, value in own.items())
    if plugin:
        assert same(state_of(other.spotlighter.plugin), state_of(trainer.spotlighter.plugin))
        assert not other.spotlighter.plugin.memory.knows_any  # but it knows what images of one class differ by


@hosts
def test_a_hosts_checkpoint_from_before_loads_and_one_from_after_loads_without_the_plug_in(
    make, tmp_path, host, capsys
):
    plain = make(host, "OPTIM.MAX_EPOCH", 1, plugin=False)
    plain.train()
    attached = make(host, S + "TOP_K", ALL, "OUTPUT_DIR", str(tmp_path / "with"), "OPTIM.MAX_EPOCH", 1)
    attached.load_model(str(tmp_path / "out"), epoch=1)
    assert "No Spotlighter state in" in capsys.readouterr().out
    images = batch_of(plain)["img"]
    assert same(state_of(attached.spotlighter.host), state_of(plain.model))
    torch.testing.assert_close(logits_of(attached, images), logits_of(plain, images), atol=1e-4, rtol=1e-4)
    attached.train()
    after = make(host, "OUTPUT_DIR", str(tmp_path / "after"), plugin=False)
    after.load_model(str(tmp_path / "with"), epoch=1)
    assert same(state_of(after.model), state_of(attached.spotlighter.host))
    saved, loaded = (t._models[t.checkpoint].state_dict() for t in (plain, attached))
    assert saved.keys() == loaded.keys()
