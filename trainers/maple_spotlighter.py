"""MaPLe with Spotlighter."""

from dassl.engine import TRAINER_REGISTRY

from spotlighter_plugin.hosts.maple import MaPLeAdapter
from spotlighter_plugin.trainer import SpotlighterTrainerMixin


@TRAINER_REGISTRY.register()
class MaPLeSpotlighter(SpotlighterTrainerMixin, TRAINER_REGISTRY.get("MaPLe")):
    adapter = MaPLeAdapter
