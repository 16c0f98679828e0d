"""CoOp with Spotlighter."""

from dassl.engine import TRAINER_REGISTRY

from spotlighter_plugin.hosts.coop import CoOpAdapter
from spotlighter_plugin.trainer import SpotlighterTrainerMixin


@TRAINER_REGISTRY.register()
class CoOpSpotlighter(SpotlighterTrainerMixin, TRAINER_REGISTRY.get("CoOp")):
    adapter = CoOpAdapter
