"""One small adapter per host; every ``HostAdapter`` defined in a file of this folder is known."""

from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from .base import HostAdapter


def all_adapters() -> list[type[HostAdapter]]:
    """The adapters in this folder, by file name; the one that takes any host comes last."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    kinds = [kind for kind in _below(HostAdapter) if kind.__module__ != HostAdapter.__module__]
    return sorted(dict.fromkeys(kinds), key=lambda kind: (kind.name == "generic", kind.__module__))


def _below(kind):
    return [each for child in kind.__subclasses__() for each in (child, *_below(child))]


def adapter_for(model: nn.Module, class_names: list[str] | None = None) -> HostAdapter:
    """The adapter that recognises ``model`` by what it has.

    Raises:
        ValueError: none does; the message says what each looked for.
    """
    adapters = all_adapters()
    for adapter in adapters:
        if adapter.matches(model):
            return adapter(model, class_names)
    wanted = "; ".join(f"{adapter.name}: {adapter.looks_for}" for adapter in adapters)
    raise ValueError(f"no adapter recognises a {type(model).__name__}; pass adapter=… (looked for {wanted})")
