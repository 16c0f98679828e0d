"""What Spotlighter adds to a host and saves: mapping, bank and memory, and the constants of evaluation."""

from typing import Any

import torch
from torch import nn

from .bank import SemanticMemoryBank
from .mapping import Mapping
from .memory import ClassMemory

GONE = ("mapping.heads", "mapping.groups", "mapping.blend", "mapping.match_weight")  # of version 0.1's checkpoints


class Plugin(nn.Module):
    """The plug-in's own modules.

    Attributes:
        mapping: what is trained.
        bank: prototypes of tokens as they enter block s; None where nothing reads them.
        memory: what the training images look like; None without ``prototype_logits``.

    Args:
        width, dim, heads: w, d and H of the vision tower.
    """

    def __init__(self, config, class_names: list[str], width: int, dim: int, heads: int):
        super().__init__()
        self.mapping = Mapping(config, width, dim, heads)
        self.bank = SemanticMemoryBank(class_names, config.prototypes, width) if config.uses_bank else None
        self.memory = ClassMemory(class_names, dim, width) if config.prototype_logits else None
        self._constants = {}

    def constant(self, name: str, make, device: torch.device, host: nn.Module | None = None) -> Any:
        """What ``make`` gives, kept until ``train``, ``eval`` or a change of ``host``'s parameters; by precision."""
        tensors = () if host is None or torch.compiler.is_compiling() else self._parameters_of(host)
        state = [(each.data_ptr(), each._version) for each in tensors]
        key = name, device, torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        kept = self._constants.get(key)
        if kept is None or (tensors and state != kept[0]):
            with torch.inference_mode(False), torch.no_grad():
                kept = self._constants[key] = state, make()
        return kept[1]

    def _parameters_of(self, host: nn.Module) -> list[nn.Parameter]:
        if "parameters" not in self._constants:  # going through all modules takes longer than looking at them
            self._constants["parameters"] = [each for each in host.parameters() if not each.is_inference()]
        return self._constants["parameters"]

    def forget_constants(self) -> None:
        self._constants.clear()

    def train(self, mode: bool = True) -> "Plugin":
        self.forget_constants()
        return super().train(mode)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False) -> Any:
        """Load mapping, bank and memory; bank and memory may be of other classes.

        Raises:
            ValueError: the state was trained with another mapping or another backbone, or by version 0.1.
        """
        self.forget_constants()
        gone = [name for name in GONE if name in state_dict]
        if gone:
            raise ValueError(f"the checkpoint is of Spotlighter 0.1 (it has {gone[0]}, see CHANGELOG.md): train anew")
        fixed = lambda state: {  # noqa: E731
            name: tuple(value.shape) if name.startswith("mapping.") else "there" for name, value in state.items()
        }
        own, saved = fixed(self.state_dict()), fixed(state_dict)
        wrong = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
        if wrong:
            raise ValueError(
                f"the checkpoint's {wrong[0]} is {saved.get(wrong[0], 'missing')}, this model's "
                f"{own.get(wrong[0], 'missing')}: set TRAINER.SPOTLIGHTER and MODEL.BACKBONE.NAME as in training"
            )
        return super().load_state_dict(state_dict, strict, assign)
