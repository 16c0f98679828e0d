"""CoOp and zero-shot CLIP: options, checkpoints, and cached text."""

import pytest
import torch
from hosts_kit import batch_of, losses_over, make_trainer
from method_kit import CLASS_NAMES, random_clip

from spotlighter_plugin.towers.clip import encode_prompts, load_clip, tokenize
from spotlighter_plugin.towers.prompts import PromptLearner, normalize


def coop(folder, *options):
    return make_trainer(folder, "CoOp", "coop", "TRAINER.COOP.PREC", "fp32", "TRAINER.COOP.N_CTX", 4, *options)


def test_words_as_context_give_zero_shot_logits(tmp_path):
    trainer = coop(tmp_path, "TRAINER.COOP.CTX_INIT", "a photo of a")
    images = batch_of(trainer)["img"]
    clip_model = load_clip(trainer.cfg.MODEL.BACKBONE.NAME)
    texts = encode_prompts(clip_model, [f"a photo of a {name}." for name in CLASS_NAMES])
    with torch.no_grad():
        expected = clip_model.logit_scale.exp() * normalize(clip_model.encode_image(images)) @ texts.t()
        torch.testing.assert_close(trainer.model(images), expected)
    zero_shot = make_trainer(tmp_path, "ZeroshotCLIP", "zsclip")
    with torch.no_grad():
        torch.testing.assert_close(zero_shot.model_inference(images), expected)


@pytest.mark.parametrize(
    ("position", "text"), [("end", "X X X red."), ("middle", "X red X X."), ("front", "red X X X.")]
)
def test_the_class_name_stands_where_the_option_says(position, text):
    clip_model = random_clip()
    learner = PromptLearner(["red", "sea_shell"], clip_model, n_ctx=3, position=position)
    with torch.no_grad():
        learner.ctx.copy_(clip_model.token_embedding(tokenize(["X"]))[0, 1])
        for row, name in zip(learner(), ("red", "sea shell"), strict=True):
            expected = clip_model.token_embedding(tokenize([text.replace("red", name)]))[0]
            assert torch.equal(row, expected)


def test_words_that_are_too_few_for_the_context_are_left_out_in_one_line(capsys):
    words, said = "a photo of a", []
    for n_ctx, text in ((5, words), (4, words), (0, words), (5, "")):
        PromptLearner(["red"], random_clip(), n_ctx=n_ctx, ctx_init=text)
        said.append(capsys.readouterr().out)
    assert said[1:] == [""] * 3 and said[0].count("\n") == 1 and "'a photo of a' is 4 tokens and N_CTX 5" in said[0]


def test_a_context_for_each_class(tmp_path):
    trainer = coop(tmp_path, "TRAINER.COOP.CSC", True)
    assert trainer.model.prompt_learner.ctx.shape == (6, 4, 64)
    losses = losses_over(trainer, 3)
    assert losses[-1] < losses[0]


def test_text_is_encoded_once_per_evaluation_and_again_when_the_prompts_change(tmp_path):
    trainer = coop(tmp_path)
    model, images = trainer.model, batch_of(trainer)["img"]
    calls = []
    model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        first = model(images)
        assert torch.equal(model(images), first) and len(calls) == 1
        model.prompt_learner.ctx.add_(0.5)
        assert not torch.equal(model(images), first) and len(calls) == 2
        model.cache_text = False
        model(images)
        model(images)
        assert len(calls) == 4


def test_nothing_of_the_frozen_image_tower_is_kept_for_the_gradient(tmp_path):
    model = coop(tmp_path).model
    assert not model.encode_image(torch.zeros(1, 3, 32, 32)).requires_grad
    assert model(torch.zeros(1, 3, 32, 32)).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["DATALOADER.K_TRANSFORMS", 2], "K_TRANSFORMS is 2: hosts take 1 view"),
        (["TRAINER.COOP.PREC", "fp8"], "fp8.*choose one of "),
        (["TRAINER.COOP.CLASS_TOKEN_POSITION", "top"], "top.*choose one of end, middle, front"),
        (["TRAINER.COOP.N_CTX", 0], "N_CTX 0"),
        (["TRAINER.COOP.N_CTX", 90], "N_CTX"),
        (["INPUT.SIZE", (224, 224)], r"INPUT.SIZE \(224, 224\).*32, 32"),
    ],
)
def test_a_bad_option_is_one_line(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        coop(tmp_path, *options)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_width_or_model_is_one_line(tmp_path):
    trainer = coop(tmp_path)
    trainer.save_model(0, str(tmp_path / "out"))
    wider = coop(tmp_path, "TRAINER.COOP.N_CTX", 5)
    with pytest.raises(ValueError, match=r"ctx of shape \(4, 64\).*\(5, 64\)") as error:
        wider.load_model(str(tmp_path / "out"), epoch=1)
    assert "\n" not in str(error.value)
    path = tmp_path / "out" / "prompt_learner" / "model.pth.tar-1"
    assert torch.load(path)["state_dict"].keys() == {"ctx", "token_prefix", "token_suffix"}  # as upstream
    torch.save(torch.load(path) | {"state_dict": {"other": torch.zeros(2)}}, path)
    with pytest.raises(ValueError, match="another model's"):
        trainer.load_model(str(tmp_path / "out"), epoch=1)
    with pytest.raises(FileNotFoundError, match="load-epoch"):
        trainer.load_model(str(tmp_path / "out"), epoch=7)
