"""Name -> class tables: trainers, data sets, evaluators, backbones."""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any


class Registry:
    """A table filled by the decorator `@REGISTRY.register()`; the class's own name is its key."""

    def __init__(self, name):
        self._name = name
        self._entries = {}

    def register(self, obj=None, force=False) -> Callable | None:
        """Register `obj`, or return a decorator that does. Raises KeyError for a name already taken, unless `force`."""
        if obj is None:
            return lambda decorated: self.register(decorated, force) or decorated
        name = obj.__name__
        if name in self._entries and not force:
            raise KeyError(f"{name} is already in the {self._name} registry")
        self._entries[name] = obj
        return None

    def get(self, name) -> Any:
        if name not in self._entries:
            raise KeyError(f"{name} is not in the {self._name} registry, which holds {self.registered_names()}")
        return self._entries[name]

    def registered_names(self) -> list[str]:
        return list(self._entries)


def check_availability(requested, available) -> None:
    """Raise a ValueError that lists `available` and the closest match unless `requested` is one of them."""
    if requested in available:
        return
    close = get_close_matches(str(requested), available, n=1, cutoff=0.0)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{requested!r} is not available (known: {', '.join(sorted(available))}){hint}")
