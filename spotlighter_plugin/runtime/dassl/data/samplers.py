"""In which order images are visited. Random numbers are drawn as Dassl draws them."""

import random
from collections import defaultdict

import numpy as np
from torch.utils.data import RandomSampler, Sampler, SequentialSampler


class _FixedLength(Sampler):
    """A sampler that counts one epoch at the start to know its length."""

    def __init__(self, data_source):
        self.data_source = data_source
        self.length = sum(1 for _ in self)

    def __len__(self):
        return self.length


class DomainSampler(_FixedLength):
    """Batches of `n_domain` domains (chosen at random, or all in order) with equally many images each.

    An epoch ends when a domain cannot fill its part of a batch any more.
    """

    def __init__(self, data_source, batch_size, n_domain=0, shuffle_domains=True):
        self.indices = defaultdict(list)
        for index, item in enumerate(data_source):
            self.indices[item.domain].append(index)
        self.domains = list(self.indices) if shuffle_domains else sorted(self.indices)
        self.n_domain = n_domain if n_domain and n_domain > 0 else len(self.domains)
        if self.n_domain > len(self.domains) or batch_size % self.n_domain:
            raise ValueError(
                f"a batch of {batch_size} cannot hold {self.n_domain} domains equally (the data have "
                f"{len(self.domains)}): change DATALOADER.TRAIN_X.BATCH_SIZE or N_DOMAIN"
            )
        self.per_domain = batch_size // self.n_domain
        self.shuffle_domains = shuffle_domains
        super().__init__(data_source)

    def __iter__(self):
        left = {domain: list(indices) for domain, indices in self.indices.items()}
        order, running = [], min(map(len, left.values())) >= self.per_domain
        while running:
            chosen = random.sample(self.domains, self.n_domain) if self.shuffle_domains else self.domains
            for domain in chosen:
                picked = random.sample(left[domain], self.per_domain)
                order += picked
                taken = set(picked)
                left[domain] = [index for index in left[domain] if index not in taken]
                running &= len(left[domain]) >= self.per_domain
        return iter(order)


class RandomClassSampler(_FixedLength):
    """Batches of batch_size / n_ins classes with `n_ins` images each; a class with fewer is filled by drawing again."""

    def __init__(self, data_source, batch_size, n_ins):
        self.indices = defaultdict(list)
        for index, item in enumerate(data_source):
            self.indices[item.label].append(index)
        self.n_ins, self.n_classes = n_ins, batch_size // n_ins
        if not 0 < self.n_classes <= len(self.indices):
            raise ValueError(
                f"a batch of {batch_size} with {n_ins} images a class needs {self.n_classes} classes, there are "
                f"{len(self.indices)}: change DATALOADER.TRAIN_X.BATCH_SIZE or N_INS"
            )
        super().__init__(data_source)

    def __iter__(self):
        groups = {}
        for label, indices in self.indices.items():
            pool = list(indices)
            if len(pool) < self.n_ins:
                pool = np.random.choice(pool, size=self.n_ins, replace=True)
            random.shuffle(pool)
            pool = [int(index) for index in pool]
            groups[label] = [pool[i : i + self.n_ins] for i in range(0, len(pool) - self.n_ins + 1, self.n_ins)]
        open_labels, order = list(self.indices), []
        while len(open_labels) >= self.n_classes:
            for label in random.sample(open_labels, self.n_classes):
                order += groups[label].pop(0)
                if not groups[label]:
                    open_labels.remove(label)
        return iter(order)


SAMPLERS = {
    "RandomSampler": lambda source, batch_size, n_domain, n_ins: RandomSampler(source),
    "SequentialSampler": lambda source, batch_size, n_domain, n_ins: SequentialSampler(source),
    "RandomDomainSampler": lambda source, batch_size, n_domain, n_ins: DomainSampler(source, batch_size, n_domain),
    "SeqDomainSampler": lambda source, batch_size, n_domain, n_ins: DomainSampler(
        source, batch_size, shuffle_domains=False
    ),
    "RandomClassSampler": lambda source, batch_size, n_domain, n_ins: RandomClassSampler(source, batch_size, n_ins),
}


def build_sampler(sampler_type, cfg=None, data_source=None, batch_size=32, n_domain=0, n_ins=16) -> Sampler:
    """The sampler of that name over `data_source`."""
    if sampler_type not in SAMPLERS:
        raise ValueError(f"sampler {sampler_type!r} is not one of {sorted(SAMPLERS)}")
    return SAMPLERS[sampler_type](data_source, batch_size, n_domain, n_ins)
