"""PromptSRC: its regularisers, its ensemble over the epochs, and that a resumed run ends alike."""

import pytest
import torch
from hosts_kit import batch_of, losses_over, make_trainer

from spotlighter_plugin.towers.clip import load_clip, tokenize
from spotlighter_plugin.towers.prompts import normalize
from trainers.promptsrc import ENSEMBLE, gaussian_weights

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
