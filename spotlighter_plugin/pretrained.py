"""A wrapper that was saved and comes back without its training data, and what it says of pictures."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .config import SpotlighterConfig
from .files import write_aside

CONFIGURATION, STATE = "config.json", "model.safetensors"


class Pretrained:
    """What ``SpotlighterWrapper`` does beside classifying batches."""

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write configuration and class names (config.json) and the plug-in's state (model.safetensors).

        The host's own weights are the host's to save. Files appear whole or not at all.

        Raises:
            OSError: the folder cannot be made or written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        said = {"config": asdict(self.config), "class_names": self.class_names}
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_aside(folder / STATE, lambda file: file.write(save(state, {"format": "pt"})), "folder")
        text = json.dumps(said, indent=2, ensure_ascii=False)
        write_aside(folder / CONFIGURATION, lambda file: file.write(f"{text}\n".encode()), "folder")

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, host_model: nn.Module, adapter=None, class_names: list[str] | None = None
    ) -> "Pretrained":
        """A wrapper around ``host_model`` as ``save_pretrained`` left it, in evaluation mode.

        Args:
            adapter: as for the constructor.
            class_names: the host's classes where they are not the saved ones; those of both lists are remembered.

        Raises:
            FileNotFoundError: the folder has no saved wrapper.
            ValueError: a file is damaged, or does not fit the host.
        """
        folder = Path(folder)
        for name in (CONFIGURATION, STATE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}: save_pretrained writes it")
        try:
            said = json.loads((folder / CONFIGURATION).read_text(encoding="utf-8"))
            config, saved_names = SpotlighterConfig(**said["config"]), said["class_names"]
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder / CONFIGURATION} is no saved configuration ({error})") from None
        try:
            state = load_file(folder / STATE)
        except SafetensorError as error:
            raise ValueError(f"{folder / STATE} is damaged ({error})") from None
        wrapper = cls(host_model, config, adapter, saved_names if class_names is None else class_names)
        try:
            wrapper.load_state_dict(state)
        except Exception:
            wrapper.detach()
            raise
        return wrapper.eval()

    @torch.no_grad()
    def predict(self, images: Tensor, top_k: int | None = None) -> tuple[list, Tensor]:
        """Names of the most probable classes of images (B, 3, h, w), and their probabilities.

        Args:
            top_k: how many classes; at most C.

        Returns:
            Without ``top_k`` a name per image and the probabilities (B,); with it a list of names per image, best
            first, and the probabilities (B, top_k).

        Raises:
            ValueError: there are not so many classes.
        """
        n_classes = len(self.class_names)
        if top_k is not None and not 1 <= top_k <= n_classes:
            raise ValueError(f"top_k = {top_k}: take 1 to {n_classes}, the number of classes")
        with self._evaluating():
            logits = self(images.to(self.adapter.logit_scale.device))  # (B, C)
        probabilities, classes = logits.softmax(-1).topk(top_k or 1)
        names = [[self.class_names[c] for c in row] for row in classes.tolist()]
        if top_k is None:
            return [name for (name,) in names], probabilities.squeeze(1)
        return names, probabilities
