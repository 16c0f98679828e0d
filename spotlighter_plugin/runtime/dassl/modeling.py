"""Backbone, head and network registries. They start empty: prompt tuning brings its own models."""

from torch import nn

from .utils import Registry, check_availability

BACKBONE_REGISTRY = Registry("BACKBONE")
HEAD_REGISTRY = Registry("HEAD")
NETWORK_REGISTRY = Registry("NETWORK")


class Backbone(nn.Module):
    """A feature extractor; sets `_out_features`."""

    @property
    def out_features(self) -> int | None:
        return self._out_features


def _builder(registry):
    def build(name, verbose=True, **kwargs):
        check_availability(name, registry.registered_names())
        if verbose:
            print(f"{registry._name.capitalize()}: {name}")
        return registry.get(name)(**kwargs)

    return build


build_backbone = _builder(BACKBONE_REGISTRY)
build_head = _builder(HEAD_REGISTRY)
build_network = _builder(NETWORK_REGISTRY)
