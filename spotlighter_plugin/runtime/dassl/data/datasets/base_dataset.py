"""What a data set is: lists of Datum, and the class names that their labels stand for."""

import random
from collections import defaultdict
from operator import attrgetter


class Datum:
    """One image: path, label, domain and class name, read-only."""

    def __init__(self, impath="", label=0, domain=0, classname=""):
        self._impath, self._label, self._domain, self._classname = impath, label, domain, classname

    impath = property(attrgetter("_impath"))
    label = property(attrgetter("_label"))
    domain = property(attrgetter("_domain"))
    classname = property(attrgetter("_classname"))

    def __repr__(self):
        return f"Datum({self.impath!r}, {self.label}, {self.domain}, {self.classname!r})"


class DatasetBase:
    """Base of all data sets; a subclass reads its lists and calls `super().__init__` with them.

    Labels are 0 … C-1, and each has a training image. Raises ValueError where one has none.
    """

    dataset_dir = ""
    domains = ()

    def __init__(self, train_x=None, train_u=None, val=None, test=None):
        self._train_x, self._train_u, self._val, self._test = train_x, train_u, val, test
        self._num_classes = self.get_num_classes(train_x)
        self._lab2cname, self._classnames = self.get_lab2cname(train_x)

    train_x = property(attrgetter("_train_x"))
    train_u = property(attrgetter("_train_u"))
    val = property(attrgetter("_val"))
    test = property(attrgetter("_test"))
    lab2cname = property(attrgetter("_lab2cname"))
    classnames = property(attrgetter("_classnames"))
    num_classes = property(attrgetter("_num_classes"))

    @staticmethod
    def get_num_classes(data_source) -> int:
        """Number of classes; every label below it must occur."""
        labels = {item.label for item in data_source or ()}
        if not labels:
            raise ValueError("the data set has no training image: check DATASET.ROOT and DATASET.NUM_SHOTS")
        if absent := sorted(set(range(max(labels) + 1)) - labels):
            shown = ", ".join(map(str, absent[:5])) + (" …" if len(absent) > 5 else "")
            raise ValueError(f"{len(absent)} of {max(labels) + 1} classes have no training image: label {shown}")
        return len(labels)

    @staticmethod
    def get_lab2cname(data_source) -> tuple[dict[int, str], list[str]]:
        """{label: class name} and the names in label order."""
        names = {item.label: item.classname for item in data_source}
        return names, [names[label] for label in sorted(names)]

    def check_input_domains(self, source_domains, target_domains) -> None:
        """Raise ValueError for an empty list or a domain that the data set does not have."""
        for flag, chosen in (("--source-domains", source_domains), ("--target-domains", target_domains)):
            if not chosen:
                raise ValueError(f"{flag} is empty; the data set has {list(self.domains)}")
            if unknown := [name for name in chosen if name not in self.domains]:
                raise ValueError(f"{flag} {unknown} is not among {list(self.domains)}")

    def generate_fewshot_dataset(self, *data_sources, num_shots=-1, repeat=False) -> list | tuple:
        """At most `num_shots` images of each class, drawn by python's generator (all below 1).

        With `repeat` a class that has fewer is filled up by drawing again. One source in, one list out.
        """
        if num_shots < 1:
            return data_sources[0] if len(data_sources) == 1 else data_sources
        print(f"Creating a {num_shots}-shot dataset")
        chosen = [self._draw(source, num_shots, repeat) for source in data_sources]
        return chosen[0] if len(chosen) == 1 else chosen

    def _draw(self, data_source, num_shots, repeat):
        drawn = []
        for items in self.split_dataset_by_label(data_source).values():
            if len(items) >= num_shots:
                drawn += random.sample(items, num_shots)
            else:
                drawn += random.choices(items, k=num_shots) if repeat else items
        return drawn

    def split_dataset_by_label(self, data_source) -> dict[int, list[Datum]]:
        return _grouped(data_source, attrgetter("label"))

    def split_dataset_by_domain(self, data_source) -> dict[int, list[Datum]]:
        return _grouped(data_source, attrgetter("domain"))


def _grouped(items, key):
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups
