"""CLIPFit with Spotlighter; the fork registers its trainer as ClipFit and has no option for the similarity's weight."""

from dassl.engine import TRAINER_REGISTRY

from spotlighter_plugin.hosts.clipfit import CLIPFitAdapter
from spotlighter_plugin.trainer import SpotlighterTrainerMixin

HOST = "CLIPFit" if "CLIPFit" in TRAINER_REGISTRY.registered_names() else "ClipFit"


@TRAINER_REGISTRY.register()
class CLIPFitSpotlighter(SpotlighterTrainerMixin, TRAINER_REGISTRY.get(HOST)):
    adapter = CLIPFitAdapter

    def make_adapter(self, host, class_names):
        options = self.cfg.TRAINER.get("CLIPFIT", {})
        return CLIPFitAdapter(host, class_names, options.get("LAMBDA", 8.0))
