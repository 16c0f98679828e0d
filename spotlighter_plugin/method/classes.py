"""Something kept per class: lists of names come in, the row of each class goes out."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn


def listed(class_names: Iterable[str] | None) -> list[str] | None:
    """Names as a list; None where there are none. Raises ValueError for what is no list of names."""
    if isinstance(class_names, (str, bytes)):
        raise ValueError(f"class_names = {class_names!r}: expected a list of names, one per class")
    names = None if class_names is None else list(class_names)
    for name in names or []:
        if not isinstance(name, str):
            raise ValueError(f"class_names has {name!r}: expected names, one per class")
    return names or None


def rows_of(kept: list[str], asked: list[str]) -> list[int]:
    """Row in ``kept`` of each class ``asked`` for, -1 where there is none.

    The n-th class of a name is the n-th of that name in ``kept``, so the same list goes by position. Names are compared
    as prompts have them: without regard to case, underscores and further spaces.
    """
    places, met, rows = defaultdict(list), defaultdict(int), []
    for row, name in enumerate(kept):
        places[_spoken(name)].append(row)
    for name in map(_spoken, asked):
        rows.append(places[name][met[name]] if met[name] < len(places[name]) else -1)
        met[name] += 1
    return rows


class NamedClasses(nn.Module):
    """A state with a row per class and the classes' names; loading one replaces it whole, names included.

    Args:
        class_names: the model's C classes; before anything is loaded, row c is ``class_names[c]``.

    Attributes:
        rows: (C,), the row of each of the model's classes, -1 for none.
        knows_any: whether any of them has a row.
    """

    def __init__(self, class_names: list[str]):
        super().__init__()
        self.asked = list(class_names)
        self.register_buffer("names", None)
        self.register_buffer("rows", None, persistent=False)
        self.name(self.asked)

    def name(self, class_names: list[str]) -> None:
        """Row c is from now on that of ``class_names[c]``."""
        text = "\n".join(" ".join(name.splitlines()) for name in class_names)
        device = None if self.names is None else self.names.device
        # Names are a tensor, so that a checkpoint holds tensors alone.
        self.names = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
        self._find_rows()

    def _find_rows(self):
        rows = rows_of(self.class_names, self.asked)
        self.rows, self.knows_any = torch.tensor(rows, device=self.names.device), max(rows) >= 0

    @property
    def class_names(self) -> list[str]:
        return bytes(self.names.tolist()).decode().split("\n")

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, own in list(self._buffers.items()):
            if prefix + name in state_dict:
                setattr(self, name, own.new_zeros(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._find_rows()


def _spoken(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())
