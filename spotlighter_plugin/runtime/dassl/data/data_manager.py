"""From a data set to the four loaders: train_x, train_u, val, test."""

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import transforms as T

from spotlighter_plugin import ranks
from spotlighter_plugin.files import read_picture

from .datasets import build_dataset
from .samplers import build_sampler
from .transforms import INTERPOLATION_MODES, build_transform


class DatasetWrapper(Dataset):
    """Reads and transforms the images of a list of Datum. Random transforms draw by an image's `Place` in the epoch.

    An item is {img, label, domain, impath, index}, plus img2, img3 … for a list of transforms and img0 with
    DATALOADER.RETURN_IMG0; or an Unreadable where the image is missing or damaged.
    """

    def __init__(self, cfg, data_source, transform=None, is_train=False):
        self.cfg, self.data_source, self.transform, self.is_train = cfg, data_source, transform, is_train
        self.k_tfm = cfg.DATALOADER.K_TRANSFORMS if is_train else 1
        self.return_img0 = cfg.DATALOADER.RETURN_IMG0
        if self.k_tfm > 1 and transform is None:
            raise ValueError(f"DATALOADER.K_TRANSFORMS is {self.k_tfm}, but there is no transform to repeat")
        plain = [T.Resize(cfg.INPUT.SIZE, interpolation=INTERPOLATION_MODES[cfg.INPUT.INTERPOLATION]), T.ToTensor()]
        if "normalize" in cfg.INPUT.TRANSFORMS:
            plain.append(T.Normalize(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD))
        self.to_tensor = T.Compose(plain)

    def __len__(self):
        return len(self.data_source)

    def __getitem__(self, idx):
        datum = self.data_source[idx]
        try:
            img0 = read_picture(datum.impath)
        except OSError as error:
            return Unreadable(str(error))
        item = {"label": datum.label, "domain": datum.domain, "impath": datum.impath, "index": idx}
        several = isinstance(self.transform, (list, tuple))
        with ranks.drawing_from(getattr(idx, "seed", None)):
            for number, transform in enumerate(self.transform if several else [self.transform], start=1):
                item["img" if number == 1 else f"img{number}"] = self._views(transform, img0)
        if self.return_img0:
            item["img0"] = self.to_tensor(img0)
        return item

    def _views(self, transform, img0):
        if transform is None:
            return img0
        views = [transform(img0) for _ in range(self.k_tfm)]
        return views if len(views) > 1 else views[0]


class Unreadable(str):
    """Stands for the item of an image that cannot be read, and says why."""


class Place(int):
    """The index of an image, and what its random transforms draw from at this place in the epoch."""

    seed: int


class Batches(Sampler):
    """Lists of indices in a sampler's order: in training this process's part of each batch, as `Place`s; in testing
    batches of this process's part of the whole."""

    def __init__(self, sampler, size, is_train):
        self.sampler, self.size, self.is_train = sampler, size, is_train

    @property
    def _places(self):
        """How many are visited: in training a last, smaller batch is dropped if there is a whole one."""
        n, whole = len(self.sampler), len(self.sampler) // self.size * self.size
        return (whole or n) if self.is_train else len(range(n)[ranks.part(n)])

    def __len__(self):
        return -(-self._places // self.size)

    def __iter__(self):
        order, seed = ranks.from_first(lambda: (list(self.sampler), ranks.coming_seed()))
        if not self.is_train:
            order = order[ranks.part(len(order))]
        for start in range(0, self._places, self.size):
            batch = order[start : start + self.size]
            yield self._part(batch, seed + start) if self.is_train else batch

    @staticmethod
    def _part(batch, seed):
        places = [Place(index) for index in batch]
        for place, own in enumerate(places):
            own.seed = seed + place
        return places[ranks.part(len(places))]


def _collate_readable(items):
    readable = [item for item in items if not isinstance(item, Unreadable)]
    lost = [item for item in items if isinstance(item, Unreadable)]
    return (default_collate(readable) if readable else None), len(readable), lost


class ReadableLoader(DataLoader):
    """A DataLoader that leaves out unreadable images and says how many and which, once.

    A batch is smaller by them, and skipped when nothing is left; of several processes all skip it when one of them has
    nothing left. Raises ValueError when a whole pass finds no image.
    """

    _told = 0

    def __iter__(self):
        read, lost, is_train = 0, [], self.batch_sampler.is_train
        for batch, count, missing in super().__iter__():
            lost += missing
            if ranks.share(count) if is_train else count:
                read += 1
                yield batch
        found = ranks.gather_objects((read, lost))
        read, lost = sum(each for each, _ in found), [line for _, each in found for line in each]
        if lost and not read:
            raise ValueError(f"none of the {len(lost)} images can be read: {lost[0]}; check DATASET.ROOT")
        if len(lost) > self._told:
            print(f"Skipped {len(lost)} of {len(self.dataset)} images that are missing or damaged")
            print("\n".join(f"  {each}" for each in lost[:5]) + ("\n  …" if len(lost) > 5 else ""))
            self._told = len(lost)


def build_data_loader(
    cfg,
    sampler_type="SequentialSampler",
    data_source=None,
    batch_size=64,
    n_domain=0,
    n_ins=2,
    tfm=None,
    is_train=True,
    dataset_wrapper=None,
) -> "ReadableLoader":
    """A loader over a list of Datum; in training the last, smaller batch is dropped if there is a whole one.

    Of several processes each gets its part: in training of every batch, in testing of the whole.
    """
    sampler = build_sampler(sampler_type, cfg, data_source, batch_size, n_domain, n_ins)
    return ReadableLoader(
        (dataset_wrapper or DatasetWrapper)(cfg, data_source, transform=tfm, is_train=is_train),
        batch_sampler=Batches(sampler, batch_size, is_train),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_collate_readable,
        pin_memory=torch.cuda.is_available() and cfg.USE_CUDA,
    )


class DataManager:
    """Builds the data set, the transforms and the loaders; train_loader_u and val_loader may be None."""

    def __init__(self, cfg, custom_tfm_train=None, custom_tfm_test=None, dataset_wrapper=None):
        self.dataset = dataset = build_dataset(cfg)
        tfm_train = custom_tfm_train or build_transform(cfg, is_train=True)
        tfm_test = custom_tfm_test or build_transform(cfg, is_train=False)
        loaders = cfg.DATALOADER
        node_u = loaders.TRAIN_X if loaders.TRAIN_U.SAME_AS_X else loaders.TRAIN_U

        def training(data_source, node):
            return build_data_loader(
                cfg, node.SAMPLER, data_source, node.BATCH_SIZE, node.N_DOMAIN, node.N_INS, tfm_train, True,
                dataset_wrapper,
            )  # fmt: skip

        def testing(data_source):
            node = loaders.TEST
            return build_data_loader(
                cfg, node.SAMPLER, data_source, node.BATCH_SIZE, tfm=tfm_test, is_train=False,
                dataset_wrapper=dataset_wrapper,
            )  # fmt: skip

        self.train_loader_x = training(dataset.train_x, loaders.TRAIN_X)
        self.train_loader_u = training(dataset.train_u, node_u) if dataset.train_u else None
        self.val_loader = testing(dataset.val) if dataset.val else None
        self.test_loader = testing(dataset.test)

        self.num_classes = dataset.num_classes
        self.num_source_domains = len(cfg.DATASET.SOURCE_DOMAINS)
        self.lab2cname = dataset.lab2cname
        if cfg.VERBOSE:
            self.show_dataset_summary(cfg)

    def show_dataset_summary(self, cfg) -> None:
        d = self.dataset
        rows = [("Dataset", cfg.DATASET.NAME), ("Source", cfg.DATASET.SOURCE_DOMAINS)]
        rows += [("Target", cfg.DATASET.TARGET_DOMAINS), ("# classes", f"{self.num_classes:,}")]
        parts = {"# train_x": d.train_x, "# train_u": d.train_u, "# val": d.val, "# test": d.test}
        rows += [(name, f"{len(part):,}") for name, part in parts.items() if part]
        rows = [(name, str(value)) for name, value in rows if value]
        rule = f"{'-' * 9}  {'-' * max(len(value) for _, value in rows)}"
        print("\n".join([rule, *(f"{name:<9}  {value}" for name, value in rows), rule]))
