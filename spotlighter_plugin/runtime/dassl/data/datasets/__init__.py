from ...utils import Registry, check_availability
from .base_dataset import DatasetBase, Datum

__all__ = ["DATASET_REGISTRY", "DatasetBase", "Datum", "build_dataset"]

DATASET_REGISTRY = Registry("DATASET")


def build_dataset(cfg) -> DatasetBase:
    """The data set DATASET.NAME, read from DATASET.ROOT."""
    check_availability(cfg.DATASET.NAME, DATASET_REGISTRY.registered_names())
    if cfg.VERBOSE:
        print(f"Loading dataset: {cfg.DATASET.NAME}")
    return DATASET_REGISTRY.get(cfg.DATASET.NAME)(cfg)
