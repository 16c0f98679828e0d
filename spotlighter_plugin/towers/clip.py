"""OpenAI CLIP by name or by path, or a bundled small CLIP; its text tower on any token embeddings.

`load_clip` is the only entrance for weights: every model is built by OpenAI's own `build_model`, in float32, and
`apply_precision` then makes of it what the PREC option asks for.
"""

from __future__ import annotations

import os
import urllib.error
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from clip import clip as openai_clip
from clip.model import CLIP, VisionTransformer, convert_weights

from ..compat import openai_clip_model
from ..files import write_aside
from .packing import Packing, common_prefix

build_model = openai_clip_model().build_model
WEIGHTS = Path(__file__).parents[1] / "weights"
BUNDLED = {"micro": WEIGHTS / "micro_clip.safetensors", "tiny": WEIGHTS / "tiny_clip.safetensors"}  # 64 and 128 wide
LIBRARIES = ("open_clip", "transformers")
ACTIVATIONS = ("gelu", "quickgelu")
PRECISIONS = ("fp16", "bf16", "fp32", "amp")
TEXT_CHUNK = 256  # classes that go through the text tower at once when no gradient is kept

_VOCABULARY = 49408  # OpenAI's byte-pair vocabulary
_REQUIRED = ("text_projection", "token_embedding.weight", "positional_embedding", "ln_final.weight", "logit_scale")


def load_clip(name: str, device: str | torch.device = "cpu") -> CLIP:
    """Load a CLIP model in float32 and evaluation mode.

    name: one of OpenAI's names (downloaded with its checksum into ~/.cache/clip), one of `BUNDLED`, or a path to a
        TorchScript archive, a state dict (.pt, .pth, .bin) or a .safetensors file. Bare weights of OpenAI's
        architecture do not say with which activation they were trained: append it, as in `weights.bin:gelu` or
        `weights.bin:quickgelu`, unless the file's name has it. `open_clip:MODEL/WEIGHTS` and
        `transformers:NAME` (or a folder) are loaded by these libraries, activation and all.
    Raises ValueError (unknown name, file that holds no CLIP), FileNotFoundError (no such file), ConnectionError (the
        download failed); each is one line.
    """
    library, name = _split_library(str(name))
    name, said = _split_activation(name)
    if library and not Path(name).expanduser().is_file():
        return _of_library(library, name).to(device)
    path = _locate(name)
    state_dict = _read_state_dict(path)
    model = _build(_expand_vocabulary(dict(state_dict)), path)
    activation = said or ("quickgelu" if name in openai_clip._MODELS else _activation_of(path, state_dict))
    return _with_activation(model, activation).to(device)


def weights_file(name: str) -> Path | None:
    """The file on this machine that ``load_clip(name)`` reads; None if a library or a download finds it by name."""
    name = _split_activation(_split_library(name)[1])[0]
    path = Path(BUNDLED.get(name, name)).expanduser()
    return next((file for file in (path, path / "model.safetensors") if file.is_file()), None)


def _with_activation(model, activation):
    if activation == "gelu":
        for block in (*model.transformer.resblocks, *_blocks(model.visual)):
            block.mlp.gelu = torch.nn.GELU()
    return model


def require_vision_transformer(clip_model: CLIP, name: str) -> None:
    """Raise ValueError unless the image tower is a vision transformer (Spotlighter selects among its tokens)."""
    if not isinstance(clip_model.visual, VisionTransformer):
        names = ", ".join(n for n in openai_clip._MODELS if n.startswith("ViT"))
        raise ValueError(f"backbone {name} is a ResNet and has no tokens to select: set MODEL.BACKBONE.NAME to {names}")


def apply_precision(model: torch.nn.Module, precision: str) -> torch.nn.Module:
    """Cast a CLIP model in place: "fp16" and "bf16" what OpenAI casts (LayerNorm and embeddings stay float32)."""
    if precision not in PRECISIONS:
        raise ValueError(f"PREC {precision!r} is unknown: choose one of {', '.join(PRECISIONS)}")
    model.float()
    if precision in ("fp16", "bf16"):
        before = {name: parameter.data for name, parameter in model.named_parameters()}
        convert_weights(model)
        for name, parameter in model.named_parameters():
            if precision == "bf16" and parameter.dtype == torch.float16:
                parameter.data = before[name].bfloat16()
    return model


def mixed_precision(device: torch.device, precision: str) -> torch.autocast:
    """The autocast that PREC asks for: on for "amp", in float16 on a GPU and in bfloat16 on a CPU that has it."""
    return torch.autocast(device.type, enabled=precision == "amp" and (device.type != "cpu" or cpu_has_bfloat16()))


def cpu_has_bfloat16() -> bool:
    """Whether matrix products run in bfloat16 here; a CPU of AVX2 emulates them, at ten times the time of float32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ---------------------------------------------------------------------------------------------------- the text tower


def tokenize(texts: list[str]) -> torch.Tensor:
    """OpenAI's tokens of each text, (C, 77). Raises ValueError for a text that does not fit."""
    try:
        return openai_clip.tokenize(texts)  # (C, 77)
    except RuntimeError as error:
        raise ValueError(f"{error}: shorten the class name or the prompt (N_CTX, CTX_INIT)") from None


def encode_tokens(
    tower: torch.nn.Module,
    embeddings: torch.Tensor,
    tokenized: torch.Tensor,
    shared: int = 1,
    beginnings: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run CLIP's text tower on given token embeddings.

    tower: anything with transformer, positional_embedding, ln_final and text_projection (a CLIP, a TextEncoder).
    embeddings: (C, T, w); tokenized: (C, T) ids, whose largest id marks the end of a text. shared: how many leading
    positions of all texts have one and the same embedding, which is encoded once for several texts, and whose gradient
    goes to the first text's. beginnings: (B, shared, w), what stands in these positions instead, B times over.
    Returns (C, d), or (B, C, d) with beginnings, not normalized. What follows the longest text's end is never computed:
    attention is causal, so nothing before it depends on it. Without gradient, classes go in chunks of
    TEXT_CHUNK.
    """
    whole = torch.is_grad_enabled() or len(embeddings) <= TEXT_CHUNK
    size = len(embeddings) if whole else TEXT_CHUNK
    pairs = zip(embeddings.split(size), tokenized.split(size), strict=True)
    texts = torch.cat([_encode_chunk(tower, chunk, ids, shared, beginnings) for chunk, ids in pairs], dim=1)
    return texts[0] if beginnings is None else texts


@torch.no_grad()
def encode_prompts(clip_model: CLIP, texts: list[str]) -> torch.Tensor:
    """Text embeddings of whole sentences, normalized, without gradient: (C, d)."""
    features = []
    for ids in tokenize(texts).to(clip_model.token_embedding.weight.device).split(TEXT_CHUNK):
        embeddings = clip_model.token_embedding(ids).type(clip_model.dtype)  # (chunk, 77, w)
        features.append(encode_tokens(clip_model, embeddings, ids, common_prefix(ids)))
    features = torch.cat(features)  # (C, d)
    return features / features.norm(dim=-1, keepdim=True)


def _encode_chunk(tower, embeddings, tokenized, shared, beginnings):
    length = int(tokenized.argmax(dim=-1).max()) + 1
    positions = tower.positional_embedding[:length].type(embeddings.dtype)
    x = embeddings[:, :length] + positions  # (C, length, w)
    packing = Packing(tokenized, shared, x.shape[-1])
    if beginnings is not None:
        beginnings = beginnings.type(x.dtype) + positions[:shared]
    with packing.masking(tower.transformer, x):
        x = packing.unpack(tower.transformer(packing.pack(x, beginnings)))  # (B, C, w)
    return tower.ln_final(x) @ tower.text_projection  # (B, C, d)


# --------------------------------------------------------------------------------------------------- reading, writing


def save_compact(
    state_dict: dict[str, torch.Tensor],
    path: str | os.PathLike,
    metadata: dict[str, str],
    rows: torch.Tensor,
    half: bool = True,
) -> None:
    """Write a CLIP state dict as safetensors with only the vocabulary rows in use; `load_clip` reads it back.

    rows: (R,) ids of the used tokens, ascending; state_dict["token_embedding.weight"] holds the whole vocabulary
        (then its rows are taken) or just these R rows. half: store in float16 (the temperature stays float32).
    """
    tensors = {key: value.detach().cpu() for key, value in state_dict.items()}
    table = tensors["token_embedding.weight"]
    tensors["token_embedding.weight"] = table if len(table) == len(rows) else table[rows.cpu()]  # (R, w)
    if half:
        tensors = {k: v.half() if v.is_floating_point() and v.dim() else v for k, v in tensors.items()}
    tensors["token_embedding.rows"] = rows.cpu().long()
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    content = safetensors.torch.save(tensors, {key: str(value) for key, value in metadata.items()})
    write_aside(path, lambda file: file.write(content), "path")


def _locate(name: str) -> Path:
    if name in BUNDLED:
        path = BUNDLED[name]
    elif name in openai_clip._MODELS:
        return _download(name)
    else:
        path = Path(name).expanduser()
        if not path.suffix and not path.is_file():
            names = ", ".join([*BUNDLED, *openai_clip._MODELS])
            raise ValueError(f"backbone {name!r} is unknown: set MODEL.BACKBONE.NAME to one of {names}, or to a file")
    if not path.is_file():
        raise FileNotFoundError(f"backbone weights {path} do not exist: set MODEL.BACKBONE.NAME to a file that does")
    return path


def _download(name: str) -> Path:
    try:
        return Path(openai_clip._download(openai_clip._MODELS[name], os.path.expanduser("~/.cache/clip")))
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise ConnectionError(
            f"weights of {name} could not be downloaded ({error}): put {openai_clip._MODELS[name].split('/')[-1]} into "
            "~/.cache/clip, or set MODEL.BACKBONE.NAME to its path"
        ) from None


def _blocks(visual):
    return visual.transformer.resblocks if isinstance(visual, VisionTransformer) else ()


def _split_activation(name: str) -> tuple[str, str | None]:
    """`file:gelu` as its two parts; a name without a known activation behind it stays as it is."""
    path, _, last = name.rpartition(":")
    return (path, last) if path and last in ACTIVATIONS else (name, None)


def _split_library(name: str) -> tuple[str | None, str]:
    """`library:name` as its two parts; a name without a known library in front of it stays as it is."""
    library, _, rest = name.partition(":")
    return (library, rest) if rest and library in LIBRARIES else (None, name)


def _of_library(library: str, name: str) -> CLIP:
    """A library's CLIP in OpenAI's architecture, seen to give the same embeddings.

    Raises ValueError, one line: the library is missing, cannot load it, or it is of another architecture.
    """
    try:
        theirs, state_dict, activation = {"open_clip": _of_open_clip, "transformers": _of_transformers}[library](name)
    except ImportError:
        raise ValueError(f"{library} is not installed: pip install 'spotlighter-plugin[{library}]'") from None
    except Exception as error:  # each library has its own errors, and a hub that is out of reach yet others
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{library} cannot load {name!r} ({reason}): check --library and --backbone") from None
    other = ValueError(
        f"{library}:{name} is no CLIP of OpenAI's architecture, which hosts need: take it as it is, with its classes' "
        "names for texts (docs/your_own_host.md)"
    )
    if state_dict is None:
        raise other
    ours = _with_activation(_build(state_dict, Path(name)), activation)
    size, ids = ours.visual.input_resolution, tokenize(["a photo of a cat."])[:, : ours.context_length]
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = zip((ours.encode_image(images), ours.encode_text(ids)), theirs(images, ids), strict=True)
        if not all((own - their).abs().max() <= 1e-3 * their.abs().max() for own, their in pairs):
            raise other
    return ours


def _of_open_clip(name):
    """MODEL/WEIGHTS, a tag or a file; what encodes (images, ids), the state, and the activation."""
    import open_clip

    architecture, _, weights = (name, "", "") if name.startswith("hf-hub:") else name.partition("/")
    if not weights and not name.startswith("hf-hub:"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)[:5]) or "a file"
        raise ValueError(f"no weights are named: write {architecture}/WEIGHTS, with one of {tags}")
    model = open_clip.create_model(architecture, pretrained=weights or None).float().eval()
    state_dict = model.state_dict()
    if not all(key in state_dict for key in _REQUIRED):
        return None, None, None
    quick = type(model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    encode = lambda images, ids: (model.encode_image(images), model.encode_text(ids))  # noqa: E731
    return encode, state_dict, "quickgelu" if quick else "gelu"


_RENAMED = {  # transformers' names; self_attn's three projections become one
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    "text_model.encoder.layers": "transformer.resblocks",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _of_transformers(name):
    """A name or a folder; what encodes (images, ids), the state, and the activation."""
    import transformers

    model = transformers.AutoModel.from_pretrained(name).float().eval()
    if not isinstance(model, transformers.CLIPModel):
        return None, None, None
    state_dict = {}
    for key, value in model.state_dict().items():
        for theirs, ours in _RENAMED.items():
            key = key.replace(theirs, ours)
        state_dict[key] = value.T if key in ("text_projection", "visual.proj") else value
    for key in [key for key in state_dict if ".self_attn.q_proj." in key]:
        parts = [state_dict.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        state_dict[key.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    taken = lambda output: output if isinstance(output, torch.Tensor) else output.pooler_output  # noqa: E731
    encode = lambda images, ids: (  # noqa: E731
        taken(model.get_image_features(pixel_values=images)),
        taken(model.get_text_features(input_ids=ids)),
    )
    return encode, state_dict, "quickgelu" if model.config.vision_config.hidden_act == "quick_gelu" else "gelu"


def _activation_of(path: Path, state_dict: dict[str, torch.Tensor]) -> str:
    """The activation of weights in a file without a name of OpenAI's: what the file's name or content says.

    Raises ValueError for bare weights that say neither; with the wrong one they would be wrong without an error.
    """
    name = path.name.lower().replace("_", "").replace("-", "")
    if "gelu" in name:
        return "quickgelu" if "quickgelu" in name else "gelu"
    if "token_embedding.rows" not in state_dict and not {"input_resolution", "context_length"} <= state_dict.keys():
        raise ValueError(
            f"{path} does not say with which activation it was trained: append :gelu, or :quickgelu (OpenAI's weights, "
            "and models of open_clip's whose names end in -quickgelu), to MODEL.BACKBONE.NAME"
        )
    return "quickgelu"


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if _is_torchscript(path):
            return torch.jit.load(path, map_location="cpu").state_dict()
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own error for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is truncated or no checkpoint ({reason[:120]}): fetch it again") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return dict(content)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in entry for entry in archive.namelist())


def _expand_vocabulary(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give a compact vocabulary its full height again; rows that were left out become the mean of those kept."""
    rows = state_dict.pop("token_embedding.rows", None)
    if rows is None:
        return state_dict
    used = state_dict["token_embedding.weight"].float()  # (R, w)
    table = used.mean(dim=0).repeat(_VOCABULARY, 1)  # (49408, w)
    table[rows] = used
    return state_dict | {"token_embedding.weight": table}


def _build(state_dict: dict[str, torch.Tensor], path: Path) -> CLIP:
    missing = [key for key in _REQUIRED if key not in state_dict]
    if missing:
        raise ValueError(f"{path} holds no CLIP of OpenAI's architecture: {missing[0]} is missing")
    try:
        model = build_model(dict(state_dict)).float()  # rounds to half on its way, so the weights are read once more
        model.load_state_dict({key: state_dict[key] for key in model.state_dict()})
    except (RuntimeError, KeyError, IndexError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no CLIP of OpenAI's architecture: {reason[:200]}") from None
    return model.eval()
