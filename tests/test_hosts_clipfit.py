"""CLIPFit: which parameters it trains, its similarity loss, and where it starts."""

import torch
import torch.nn.functional as F
from hosts_kit import batch_of, make_trainer
from random_clips import CLASS_NAMES

from spotlighter_plugin.towers.clip import encode_prompts, load_clip
from spotlighter_plugin.towers.prompts import normalize


def clipfit(folder, *options):
    return make_trainer(folder, "CLIPFit", "clipfit", "TRAINER.CLIPFIT.PREC", "fp32", "OPTIM.LR", 0.002, *options)


def test_it_starts_at_zero_shot_clip(tmp_path):
    trainer = clipfit(tmp_path)
    images, clip_model = batch_of(trainer)["img"], load_clip(trainer.cfg.MODEL.BACKBONE.NAME)
    texts = encode_prompts(clip_model, [f"a photo of a {name}." for name in CLASS_NAMES])
    with torch.no_grad():
        expected = clip_model.logit_scale.exp() * normalize(clip_model.encode_image(images)) @ texts.t()
        torch.testing.assert_close(trainer.model(images), expected)


def test_the_similarity_loss_holds_the_texts_near_the_frozen_ones(tmp_path):
    trainer = clipfit(tmp_path, "TRAINER.CLIPFIT.LAMBDA", 3.0)
    batch = batch_of(trainer)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name.endswith("mlp.c_proj.bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
        loss, _ = trainer.objective(batch["img"], batch["label"])
        logits = trainer.model(batch["img"])
        frozen = normalize(trainer.model.prompt_learner.text_features)
        similarity = (trainer.model.text_features() * frozen).sum(1).mean()
    assert similarity < 0.99
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch["label"]) + 3 * (1 - similarity))


def test_a_run_trains_saves_and_loads_into_other_class_names(tmp_path):
    trainer = clipfit(tmp_path, "DATASET.SUBSAMPLE_CLASSES", "base", "OPTIM.MAX_EPOCH", 1)
    trainer.train()
    keys = set(torch.load(tmp_path / "out/prompt_learner/model.pth.tar-1", weights_only=True)["state_dict"])
    assert "text_features" not in keys and "image_encoder.ln_post.bias" in keys
    other = clipfit(tmp_path, "DATASET.SUBSAMPLE_CLASSES", "new", "OUTPUT_DIR", str(tmp_path / "other"))
    frozen = other.model.prompt_learner.text_features.clone()
    other.load_model(str(tmp_path / "out"), epoch=1)
    assert torch.equal(other.model.image_encoder.ln_post.bias, trainer.model.image_encoder.ln_post.bias)
    assert torch.equal(other.model.prompt_learner.text_features, frozen)
