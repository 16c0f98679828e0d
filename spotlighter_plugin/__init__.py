"""Spotlighter: a plug-in that selects tokens and remembers classes for CLIP prompt tuning.

from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper
model = SpotlighterWrapper(host_model, SpotlighterConfig(top_k=32))
"""

from . import compat

compat.apply()

__all__ = ["SpotlighterConfig", "SpotlighterWrapper"]
__version__ = "0.2.0"


def __getattr__(name):
    if name == "SpotlighterConfig":
        from .config import SpotlighterConfig

        return SpotlighterConfig
    if name == "SpotlighterWrapper":
        from .wrapper import SpotlighterWrapper

        return SpotlighterWrapper
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
