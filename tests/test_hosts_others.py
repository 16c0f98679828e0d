"""What is peculiar to CLIPFit, KgCoOp, CoCoOp and MMRL: their losses, their texts, and which features decide."""

import pytest
import torch
import torch.nn.functional as F
from hosts_kit import batch_of, make_trainer
from method_kit import CLASS_NAMES

from spotlighter_plugin.hosts import adapter_for
from spotlighter_plugin.towers.clip import encode_prompts, encode_tokens, load_clip
from spotlighter_plugin.towers.prompts import normalize
from trainers import cocoop

OPTIONS = {
    "CLIPFit": ["TRAINER.CLIPFIT.PREC", "fp32", "OPTIM.LR", 0.002],
    "KgCoOp": ["TRAINER.COOP.PREC", "fp32", "TRAINER.COOP.N_CTX", 4],
    "CoCoOp": ["TRAINER.COCOOP.PREC", "fp32", "TRAINER.COCOOP.N_CTX", 4],
    "MMRL": ["TRAINER.MMRL.PREC", "fp32", "OPTIM.NAME", "adamw", "OPTIM.LR", 0.002, "TRAINER.MMRL.REP_LAYERS", [2, 3]],
}


def make(folder, host, *options, plugin=False):
    return make_trainer(folder, host + "Spotlighter" * plugin, host.lower(), *OPTIONS[host], *options)


def hand_written(trainer):
    clip_model = load_clip(trainer.cfg.MODEL.BACKBONE.NAME)
    return clip_model, encode_prompts(clip_model, [f"a photo of a {name}." for name in CLASS_NAMES])


def move(trainer, scale=0.3):
    """Put what is trained elsewhere."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


# ------------------------------------------------------------------------------------------------- CLIPFit and KgCoOp


def test_clipfit_starts_at_zero_shot_clip(tmp_path):
    trainer = make(tmp_path, "CLIPFit")
    images, (clip_model, texts) = batch_of(trainer)["img"], hand_written(trainer)
    with torch.no_grad():
        expected = clip_model.logit_scale.exp() * normalize(clip_model.encode_image(images)) @ texts.t()
        torch.testing.assert_close(trainer.model(images), expected)


@pytest.mark.parametrize(("host", "weight"), [("CLIPFit", "TRAINER.CLIPFIT.LAMBDA"), ("KgCoOp", "TRAINER.COOP.W")])
def test_the_texts_are_held_near_those_of_hand_written_prompts_with_the_plug_in_and_without(tmp_path, host, weight):
    trainer = make(tmp_path, host, weight, 3.0)
    move(trainer)
    batch, model = batch_of(trainer), trainer.model
    adapter = type(adapter_for(model))(model, None, 3.0)
    with torch.no_grad():
        loss, _ = trainer.objective(batch["img"], batch["label"])
        logits = model(batch["img"])
        similarity = (model.text_features() * hand_written(trainer)[1]).sum(1).mean()
        with_plugin = adapter.objective(logits, batch["label"], {"text": model.encode_text()})
    assert similarity < 0.99
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch["label"]) + 3 * (1 - similarity))
    torch.testing.assert_close(with_plugin, loss)


# ------------------------------------------------------------------------------------------------------------- CoCoOp


def test_cocoops_logits_are_those_of_each_images_own_texts_however_many_go_at_once(tmp_path, monkeypatch):
    trainer = make(tmp_path, "CoCoOp")
    move(trainer)
    model, images = trainer.model, batch_of(trainer)["img"][:5]
    learner, logits = model.prompt_learner, []
    with torch.no_grad():
        for image in normalize(model.encode_image(images)):
            ctx = (learner.ctx + learner.meta_net(image)).expand(6, -1, -1)
            prompts = torch.cat([learner.token_prefix, ctx, learner.token_suffix], dim=1)  # (C, 77, w)
            texts = normalize(encode_tokens(model.text_encoder, prompts, model.tokenized_prompts))
            logits.append(model.logit_scale.exp() * image @ texts.T)
        torch.testing.assert_close(model(images), torch.stack(logits), atol=1e-4, rtol=1e-4)
        monkeypatch.setattr(cocoop, "TEXTS", 2 * 6)  # two images' texts
        torch.testing.assert_close(model(images), torch.stack(logits), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(images).detach(), torch.stack(logits), atol=1e-4, rtol=1e-4)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_cocoops_adapter_reads_the_texts_that_no_image_has_moved(tmp_path):
    trainer = make(tmp_path, "CoCoOp", "TRAINER.COCOOP.CTX_INIT", "a photo of a")
    adapter = adapter_for(trainer.model, CLASS_NAMES)
    for _ in range(2):  # the second time from what the model keeps
        with torch.no_grad():
            torch.testing.assert_close(adapter.encode_text(), hand_written(trainer)[1])


# --------------------------------------------------------------------------------------------------------------- MMRL


@torch.no_grad()
def test_mmrls_texts_are_those_of_tokens_put_behind_the_start_of_each_sentence(tmp_path):
    trainer = make(tmp_path, "MMRL")
    move(trainer)
    model = trainer.model
    tower, tokens, ends = model.text_encoder, model.representation_learner.text(), model.tokenized_prompts.argmax(1)
    expected = []
    for prompt, end in zip(model.prompt_embeddings, ends, strict=True):
        x = (prompt + tower.positional_embedding).unsqueeze(1)  # (77, 1, w)
        for i, block in enumerate(tower.transformer.resblocks):
            if i in tokens:
                x = torch.cat([x[:1], tokens[i].unsqueeze(1), x[1 if len(x) == 77 else 6 :]])
            block.attn_mask, whole = torch.full((len(x), len(x)), -torch.inf).triu(1), block.attn_mask
            x = block(x)
            block.attn_mask = whole
        expected.append(tower.ln_final(x[end + 5, 0]) @ tower.text_projection)
    assert len(x) == 77 + 5
    torch.testing.assert_close(model.encode_text(), torch.stack(expected), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_mmrl_sees_an_image_in_its_class_token_and_in_the_mean_of_its_representation_tokens(tmp_path):
    trainer = make(tmp_path, "MMRL", "TRAINER.MMRL.ALPHA", 0.6)
    move(trainer)
    model, batch, left = trainer.model, batch_of(trainer), []
    tower, clip_model = model.image_encoder, load_clip(trainer.cfg.MODEL.BACKBONE.NAME)
    tower.transformer.resblocks[-1].register_forward_hook(lambda module, args, output: left.append(output))
    logits, by_representation, image, text = model.both(batch["img"])
    assert len(left[0]) == 1 + 5 + 16
    representation = normalize(tower.ln_post(left[0][1:6]).mean(0) @ tower.proj_rep)
    torch.testing.assert_close(by_representation, model.logit_scale.exp() * representation @ text.T)
    torch.testing.assert_close(model(batch["img"]), 0.6 * logits + 0.4 * by_representation)
    frozen_image, frozen_text = normalize(clip_model.encode_image(batch["img"])), hand_written(trainer)[1]
    away = 2 - (image * frozen_image).sum(1).mean() - (text * frozen_text).sum(1).mean()
    losses = [F.cross_entropy(each, batch["label"]) for each in (logits, by_representation)]
    loss, _ = trainer.objective(batch["img"], batch["label"])  # this data set's weight is 1
    torch.testing.assert_close(loss, 0.6 * losses[0] + 0.4 * losses[1] + away)


@pytest.mark.parametrize("plugin", [False, True], ids=["alone", "with the plug-in"])
def test_mmrls_representation_tokens_have_a_say_on_the_classes_that_were_trained_alone(tmp_path, plugin):
    keep_all = ["TRAINER.SPOTLIGHTER.TOP_K", 16, "TRAINER.SPOTLIGHTER.PROTOTYPE_LOGITS", False]
    base = make(tmp_path, "MMRL", "DATASET.SUBSAMPLE_CLASSES", "base", "OPTIM.MAX_EPOCH", 1, *keep_all, plugin=plugin)
    base.train()
    for classes, fused in (("base", True), ("new", False), ("all", False)):
        options = ["DATASET.SUBSAMPLE_CLASSES", classes, "OUTPUT_DIR", str(tmp_path / classes), *keep_all]
        other = make(tmp_path, "MMRL", *options, plugin=plugin)
        other.load_model(str(tmp_path / "out"), epoch=1)
        other.set_model_mode("eval")
        images = batch_of(other)["img"]
        with torch.no_grad():
            logits, by_representation, *_ = other.model.both(images)
            expected = 0.7 * logits + 0.3 * by_representation if fused else logits
            torch.testing.assert_close(other.model_inference(images), expected, atol=1e-4, rtol=1e-4)


def test_a_block_that_no_tower_has_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"REP_LAYERS \[7\]: the tower has blocks 1 to 3: name some") as error:
        make(tmp_path, "MMRL", "TRAINER.MMRL.REP_LAYERS", [7])
    assert "\n" not in str(error.value)
