"""CLIPs as libraries give them: OpenAI's, open_clip's and transformers' own classes, with random weights."""

import clip
import pytest
import torch
import torch.nn.functional as F
from method_kit import CLASS_NAMES, random_clip
from PIL import Image
from towers_kit import HAS, open_clip_model, transformers_model

from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper
from spotlighter_plugin.hosts import adapter_for
from spotlighter_plugin.hosts.open_clip import OpenCLIPAdapter
from spotlighter_plugin.hosts.transformers import TransformersAdapter

TEXTS = [f"a photo of a {name}." for name in CLASS_NAMES]


def some_ids(texts):
    """Tokens for a vocabulary that has no tokenizer here."""
    return torch.tensor([[(7 * len(text) + i) % 90 + 1 for i in range(16)] for text in texts])


def openai():
    model = random_clip()
    return model, {}, lambda images: model.encode_image(images), lambda: model.encode_text(clip.tokenize(TEXTS))


def of_open_clip(kind):
    import open_clip

    model, tokens = open_clip_model(kind), open_clip.SimpleTokenizer()(TEXTS)
    return model, {}, model.encode_image, lambda: model.encode_text(tokens)


def of_transformers(kind):
    model = transformers_model(kind)
    ids = clip.tokenize(TEXTS) if kind == "clip" else some_ids(TEXTS)
    take = lambda output: output if isinstance(output, torch.Tensor) else output.pooler_output  # noqa: E731
    given = {} if kind == "clip" else {"tokenizer": some_ids}
    return (
        *(model, given, lambda images: take(model.get_image_features(pixel_values=images))),
        lambda: take(model.get_text_features(input_ids=ids)),
    )


def library(name):
    absent = pytest.mark.skipif(not HAS.get(name.split("-")[0], True), reason=f"{name.split('-')[0]} is not installed")
    return pytest.param(name, marks=absent)


MODELS = {
    "OpenAI": openai,
    "open_clip-clip": lambda: of_open_clip("clip"),
    "open_clip-siglip": lambda: of_open_clip("siglip"),
    "transformers-clip": lambda: of_transformers("clip"),
    "transformers-siglip": lambda: of_transformers("siglip"),
}


@pytest.fixture(params=[library(name) for name in MODELS])
def made(request):
    """A library's model, what its adapter needs beside it, and its own two encoders."""
    return MODELS[request.param]()


def wrap(model, given, **options):
    adapter = adapter_for(model, CLASS_NAMES) if not given else TransformersAdapter(model, CLASS_NAMES, **given)
    return SpotlighterWrapper(model, SpotlighterConfig(**options), adapter).eval()


def images_for(wrapper, number=6):
    return torch.randn(number, 3, *wrapper.adapter.layout.image_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_librarys_model_with_every_token_gives_its_own_zero_shot_logits(made):
    model, given, encode_image, encode_text = made
    n_tokens = adapter_for(model, CLASS_NAMES).layout.n_tokens if not given else 16
    wrapper = wrap(model, given, top_k=n_tokens, select_block=1)
    images = images_for(wrapper)
    expected = model.logit_scale.exp() * F.normalize(encode_image(images)) @ F.normalize(encode_text()).T
    bias = getattr(model, "logit_bias", None)
    torch.testing.assert_close(wrapper(images), expected + (0 if bias is None else bias), atol=1e-4, rtol=1e-4)
    assert wrapper.invariance < 1e-5


@pytest.mark.parametrize("activation", ("attention", "lens", "random"))
@torch.no_grad()
def test_a_librarys_model_keeps_few_tokens_remembers_and_is_itself_again_afterwards(made, activation):
    model, given, encode_image, _ = made
    state = {key: value.clone() for key, value in model.state_dict().items()}
    wrapper = wrap(model, given, top_k=5, select_block=1, activation=activation)
    images, labels = images_for(wrapper), torch.arange(6)
    before = encode_image(images)
    few = wrapper(images)
    assert few.isfinite().all() and wrapper.kept.shape == (6, 5)
    wrapper.remember([(images, labels)])
    wrapper.plugin.memory.weight.fill_(1e3)  # texts are random
    wrapper.refresh()
    assert wrapper(images).argmax(1).tolist() == labels.tolist()
    assert torch.equal(encode_image(images), before)
    wrapper.detach()
    assert torch.equal(encode_image(images), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_librarys_model_is_trained_with_the_papers_losses(made):
    model, given, *_ = made
    wrapper = wrap(model.requires_grad_(False), given, preset="paper", top_k=6).train()
    images = images_for(wrapper)
    for _ in range(2):
        loss = wrapper(images, torch.arange(6))["loss"]
        loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in wrapper.trainable_parameters())


def test_the_score_of_a_tower_without_cls_is_the_attention_of_its_pooling_query():
    pytest.importorskip("transformers")
    model = transformers_model("siglip")
    wrapper = wrap(model, {"tokenizer": some_ids}, top_k=5, select_block=2)
    images, tower = images_for(wrapper), model.vision_model
    with torch.no_grad():
        wrapper(images)
        hidden = tower.embeddings(images)
        for layer in tower.encoder.layers[:2]:
            hidden = layer(hidden, attention_mask=None)
        hidden = tower.post_layernorm(hidden)
        probe = tower.head.probe.expand(6, -1, -1)
        weights = tower.head.attention(probe, hidden, hidden)[1][:, 0]  # (B, N), mean over heads
    assert wrapper.kept.tolist() == weights.sort(dim=-1, descending=True).indices[:, :5].tolist()


def test_preprocessing_is_the_librarys_own(made):
    model, given, *_ = made
    adapter = wrap(model, given, top_k=5).adapter
    picture = Image.new("RGB", (90, 70), "red")
    tensor = adapter.preprocess(picture)
    assert tensor.shape == (3, *adapter.layout.image_size) and tensor.dtype == torch.float32
    assert tensor[0].mean() > tensor[1].mean()


@pytest.mark.skipif(not HAS["open_clip"], reason="open_clip is not installed")
def test_open_clips_preprocessing_is_that_of_its_factory():
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-S-32")
    picture = Image.effect_noise((300, 260), 80).convert("RGB")
    assert torch.equal(OpenCLIPAdapter(model, CLASS_NAMES).preprocess(picture), preprocess(picture))


def test_without_class_names_or_a_tokenizer_a_library_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^a plain CLIP knows no classes: pass class_names=\[...\]$"):
        SpotlighterWrapper(random_clip())
    if HAS["transformers"]:
        with pytest.raises(ValueError, match="no tokenizer of .*: pass the adapter a tokenizer=…") as error:
            SpotlighterWrapper(transformers_model("siglip"), class_names=CLASS_NAMES)
        assert "\n" not in str(error.value)
