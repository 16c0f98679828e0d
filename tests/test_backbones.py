"""towers/clip.py: where weights come from, what is said when they are bad, and the trimmed text tower."""

import json

import pytest
import torch
from clip.model import CLIP
from method_kit import random_clip
from safetensors.torch import save_file
from towers_kit import transformers_model

from spotlighter_plugin.towers import clip as backbones
from spotlighter_plugin.towers.clip import (
    apply_precision,
    encode_prompts,
    encode_tokens,
    load_clip,
    require_vision_transformer,
    save_compact,
    tokenize,
)
from spotlighter_plugin.towers.prompts import normalize

TEXTS = ["a photo of a dog.", "red", "a very long sentence about many different small things in one picture."]


@pytest.fixture(scope="module")
def model():
    return random_clip()


def test_a_state_dict_comes_back_bit_for_bit(model, tmp_path):
    for name in ("weights.pt", "weights.pth"):
        torch.save(model.state_dict(), tmp_path / name)
        loaded = load_clip(f"{tmp_path / name}:quickgelu")
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
        assert loaded.dtype == torch.float32 and not loaded.training
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "weights.safetensors")
    loaded = load_clip(f"{tmp_path / 'weights.safetensors'}:quickgelu")
    assert torch.equal(loaded.visual.proj, model.visual.proj)


def test_a_torchscript_archive_loads(model, tmp_path):
    traced = torch.jit.trace(model, (torch.zeros(1, 3, 32, 32), tokenize(["red"])), check_trace=False)
    traced.save(str(tmp_path / "archive.pt"))
    loaded = load_clip(f"{tmp_path / 'archive.pt'}:quickgelu")
    assert torch.equal(loaded.text_projection, model.text_projection)


def test_the_compact_format_keeps_used_words_and_gives_the_others_their_mean(model, tmp_path):
    rows = tokenize(TEXTS).unique().long()
    save_compact(model.state_dict(), tmp_path / "c.safetensors", {"seed": "1"}, rows, half=False)
    assert (tmp_path / "c.safetensors").stat().st_size < 4_000_000
    loaded = load_clip(str(tmp_path / "c.safetensors"))
    assert torch.equal(encode_prompts(loaded, TEXTS), encode_prompts(model, TEXTS))
    table = loaded.token_embedding.weight
    assert table.shape == (49408, 64)
    unused = next(i for i in range(49408) if i not in rows)
    torch.testing.assert_close(table[unused], table[rows].mean(0))


def test_the_compact_format_takes_a_vocabulary_that_is_already_compact_and_half_stays_close(model, tmp_path):
    rows = tokenize(TEXTS).unique().long()
    state = model.state_dict() | {"token_embedding.weight": model.token_embedding.weight[rows]}
    save_compact(state, tmp_path / "c.safetensors", {}, rows)
    loaded = load_clip(str(tmp_path / "c.safetensors"))
    assert loaded.dtype == torch.float32 and torch.equal(loaded.logit_scale, model.logit_scale)
    torch.testing.assert_close(encode_prompts(loaded, TEXTS), encode_prompts(model, TEXTS), atol=5e-3, rtol=0)


def test_trimming_after_the_longest_text_changes_nothing(model):
    ids = tokenize(TEXTS)
    whole = normalize(model.encode_text(ids))
    trimmed = normalize(encode_tokens(model, model.token_embedding(ids), ids))
    assert (whole - trimmed).abs().max() < 1e-6
    assert model.transformer.resblocks[0].attn_mask.shape == (77, 77)


def test_the_trimmed_tower_still_carries_gradient_to_the_embeddings(model):
    ids = tokenize(TEXTS)
    embeddings = model.token_embedding(ids).detach().requires_grad_()
    encode_tokens(model, embeddings, ids).sum().backward()
    assert embeddings.grad[:, 1].abs().sum() > 0 and embeddings.grad[1, 10:].abs().sum() == 0


def test_many_classes_in_chunks_equal_all_at_once(model, monkeypatch):
    ids = tokenize(TEXTS * 4)
    embeddings = model.token_embedding(ids).detach()
    at_once = normalize(encode_tokens(model, embeddings, ids))
    monkeypatch.setattr(backbones, "TEXT_CHUNK", 5)
    with torch.no_grad():
        assert (normalize(encode_tokens(model, embeddings, ids)) - at_once).abs().max() < 1e-6


def test_an_interrupted_pass_gives_the_blocks_their_masks_back(model):
    ids = tokenize(["red"])
    with pytest.raises(RuntimeError):
        encode_tokens(model, torch.zeros(1, 77, 3), ids)
    assert model.transformer.resblocks[0].attn_mask.shape == (77, 77)


def test_fp16_halves_the_matrices_and_keeps_layer_norms(tmp_path):
    model = apply_precision(random_clip(), "fp16")
    assert model.dtype == torch.float16 and model.ln_final.weight.dtype == torch.float32
    features = encode_prompts(model, TEXTS)
    assert features.dtype == torch.float16
    torch.testing.assert_close(features.float(), encode_prompts(random_clip(), TEXTS), atol=1e-2, rtol=0)
    exact, bfloat = random_clip(), apply_precision(random_clip(), "bf16")
    assert bfloat.dtype == torch.bfloat16 and bfloat.ln_final.weight.dtype == torch.float32
    assert torch.equal(bfloat.visual.conv1.weight, exact.visual.conv1.weight.bfloat16())  # rounded once
    assert apply_precision(model, "amp").dtype == torch.float32
    with pytest.raises(ValueError, match="fp8"):
        apply_precision(model, "fp8")


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_amp_is_float32_on_a_cpu_that_would_only_emulate_bfloat16(monkeypatch, has_bfloat16):
    monkeypatch.setattr(backbones, "cpu_has_bfloat16", lambda: has_bfloat16)
    x = torch.ones(2, 2)
    with backbones.mixed_precision(torch.device("cpu"), "amp"):
        assert (x @ x).dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    with backbones.mixed_precision(torch.device("cpu"), "fp32"):
        assert (x @ x).dtype == torch.float32


def one_line(error):
    return "\n" not in str(error.value)


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(ValueError, match="ViT-B/17.*ViT-B/16") as error:
        load_clip("ViT-B/17")
    assert one_line(error)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt") as error:
        load_clip(str(tmp_path / "nowhere.pt"))
    assert one_line(error)


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_a_truncated_file_is_named(model, tmp_path, name):
    whole = tmp_path / name.replace("cut", "whole")
    if name.endswith("pt"):
        torch.save(model.state_dict(), whole)
    else:
        save_file({k: v.clone() for k, v in model.state_dict().items()}, whole)
    (tmp_path / name).write_bytes(whole.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=f"{name} is truncated") as error:
        load_clip(str(tmp_path / name))
    assert one_line(error)


def test_another_architecture_is_named(model, tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    state = model.state_dict()
    torch.save(state | {"visual.proj": torch.zeros(100, 64)}, tmp_path / "width.pt")
    for name in ("other.pt", "width.pt"):
        with pytest.raises(ValueError, match=f"{name}.*OpenAI's architecture") as error:
            load_clip(str(tmp_path / name))
        assert one_line(error)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_run"), "w"))

    torch.save({"text_projection": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt"):
        load_clip(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "was_run").exists()


def test_a_resnet_backbone_is_refused_by_name(model):
    resnet = CLIP(64, 32, (1, 1, 1, 1), 2, None, 77, 100, 64, 1, 1)
    with pytest.raises(ValueError, match="RN50 is a ResNet") as error:
        require_vision_transformer(resnet, "RN50")
    assert one_line(error)
    require_vision_transformer(model, "ViT-B/16")


def test_a_failed_download_says_where_to_put_the_file(monkeypatch):
    def refuse(url, root):
        raise OSError("no route")

    monkeypatch.setattr(backbones.openai_clip, "_download", refuse)
    with pytest.raises(ConnectionError, match="ViT-B-16.pt") as error:
        load_clip("ViT-B/16")
    assert one_line(error)


def test_a_text_that_is_too_long_says_what_to_shorten():
    with pytest.raises(ValueError, match="N_CTX"):
        tokenize(["word " * 90])


def test_the_bundled_towers_are_of_two_widths_and_load_by_name():
    towers = {name: load_clip(name) for name in backbones.BUNDLED}
    assert {name: clip.visual.conv1.out_channels for name, clip in towers.items()} == {"micro": 64, "tiny": 128}
    assert {clip.visual.input_resolution for clip in towers.values()} == {112}


def test_open_clips_weights_keep_the_activation_that_they_were_trained_with(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    texts, images = tokenize(TEXTS), torch.randn(2, 3, 32, 32)
    vision = {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32, "head_width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    for quick, names in (
        (False, ("open_clip.bin:gelu", "vit-gelu.pt")),
        (True, ("open_clip.bin:quickgelu", "b-quickgelu.pt")),
    ):
        theirs = open_clip.CLIP(64, vision, text, quick_gelu=quick).eval()
        for name in names:
            torch.save(theirs.state_dict(), tmp_path / name.split(":")[0])
            ours = load_clip(str(tmp_path / name))
            with torch.no_grad():
                torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images), atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(ours.encode_text(texts), theirs.encode_text(texts), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "plain.pt", "plain.safetensors"])
def test_weights_that_do_not_say_their_activation_are_refused_by_the_option_that_does(model, tmp_path, name):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file({k: v.clone() for k, v in model.state_dict().items()}, path)
    else:
        torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match=rf"{path} does not say .* append :gelu, or :quickgelu .*BACKBONE.NAME") as e:
        load_clip(str(path))
    assert one_line(e)
    quick, exact = (load_clip(f"{path}:{activation}") for activation in backbones.ACTIVATIONS[::-1])
    assert not torch.equal(*(clip.encode_image(torch.ones(1, 3, 32, 32)) for clip in (quick, exact)))


def saved_by_transformers(folder, **options):
    """A small CLIP in a folder of transformers', and what it makes of pictures and texts."""
    pytest.importorskip("transformers")
    settings = {"intermediate_size": 256, "num_attention_heads": 1, **options}
    model = transformers_model(text=settings | {"eos_token_id": 49407}, vision=settings)
    model.save_pretrained(folder)
    taken = lambda output: output if isinstance(output, torch.Tensor) else output.pooler_output  # noqa: E731
    return lambda images: taken(model.get_image_features(images)), lambda ids: taken(model.get_text_features(ids))


@torch.no_grad()
def test_transformers_clip_gives_a_host_the_embeddings_that_it_gave_there_with_its_activation(tmp_path):
    images, texts = torch.randn(2, 3, 32, 32), tokenize(TEXTS)
    for activation in ("quick_gelu", "gelu"):
        image, text = saved_by_transformers(tmp_path / activation, hidden_act=activation)
        ours = load_clip(f"transformers:{tmp_path / activation}")
        torch.testing.assert_close(ours.encode_image(images), image(images), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.encode_text(texts), text(texts), atol=1e-4, rtol=1e-4)
        assert backbones.weights_file(f"transformers:{tmp_path / activation}").name == "model.safetensors"


@torch.no_grad()
def test_open_clips_own_loader_gives_a_host_the_embeddings_that_it_gave_there_with_its_activation(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    images, texts = torch.randn(2, 3, 32, 32), tokenize(TEXTS)
    vision = {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32, "head_width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    for quick in (True, False):
        settings = {"embed_dim": 48, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick}
        (tmp_path / f"small-{quick}.json").write_text(json.dumps(settings))
        open_clip.add_model_config(tmp_path / f"small-{quick}.json")
        theirs = open_clip.create_model(f"small-{quick}").eval()
        torch.save(theirs.state_dict(), tmp_path / "weights.bin")
        ours = load_clip(f"open_clip:small-{quick}/{tmp_path / 'weights.bin'}")
        torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.encode_text(texts), theirs.encode_text(texts), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="append :gelu, or :quickgelu"):
        load_clip(f"open_clip:{tmp_path / 'weights.bin'}")
    assert load_clip(f"open_clip:{tmp_path / 'weights.bin'}:gelu").visual.input_resolution == 32
    with pytest.raises(ValueError, match="no weights are named: write ViT-B-16/WEIGHTS, with one of openai") as error:
        load_clip("open_clip:ViT-B-16")
    assert one_line(error)


def test_a_librarys_tower_of_another_architecture_is_refused_in_one_line_that_says_the_next_step(tmp_path):
    saved_by_transformers(tmp_path / "heads", num_attention_heads=2)  # OpenAI's heads are 64 wide
    with pytest.raises(ValueError, match="heads is no CLIP of OpenAI's architecture.*your_own_host.md") as error:
        load_clip(f"transformers:{tmp_path / 'heads'}")
    assert one_line(error)
    with pytest.raises(ValueError, match="transformers cannot load .*absent.*check --library and --backbone") as error:
        load_clip(f"transformers:{tmp_path / 'absent'}")
    assert one_line(error)
