"""Image -> tensor (3, H, W), for training and for test, from the INPUT node of the configuration."""

import random

import numpy as np
import torch
from torchvision import transforms as T
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

INTERPOLATION_MODES = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "nearest": InterpolationMode.NEAREST,
}


class Random2DTranslation:
    """With probability p enlarge by an eighth and cut the target size out at random; otherwise just resize."""

    def __init__(self, height, width, p=0.5, interpolation=InterpolationMode.BILINEAR):
        self.size, self.p, self.interpolation = (height, width), p, interpolation

    def __call__(self, img):
        if random.uniform(0, 1) > self.p:
            return F.resize(img, list(self.size), self.interpolation)
        height, width = self.size
        larger = [round(height * 1.125), round(width * 1.125)]
        left = round(random.uniform(0, larger[1] - width))
        top = round(random.uniform(0, larger[0] - height))
        return F.crop(F.resize(img, larger, self.interpolation), top, left, height, width)


class InstanceNormalization:
    """Each channel of an image to mean 0, standard deviation 1."""

    def __init__(self, eps=1e-8):
        self.eps = eps

    def __call__(self, img):
        std, mean = torch.std_mean(img, dim=(1, 2), keepdim=True)  # (3, 1, 1)
        return (img - mean) / (std + self.eps)


class Cutout:
    """Set `n_holes` squares of `length` pixels to zero; a square may reach over the border."""

    def __init__(self, n_holes=1, length=16):
        self.n_holes, self.length = n_holes, length

    def __call__(self, img):
        height, width = img.shape[1:]
        img, half = img.clone(), self.length // 2
        for _ in range(self.n_holes):
            y, x = np.random.randint(height), np.random.randint(width)
            img[:, max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0.0
        return img


class GaussianNoise:
    """With probability p add noise of the given mean and standard deviation."""

    def __init__(self, mean=0, std=0.15, p=0.5):
        self.mean, self.std, self.p = mean, std, p

    def __call__(self, img):
        if random.uniform(0, 1) > self.p:
            return img
        return img + torch.randn(img.size()) * self.std + self.mean


def _interpolation(c):
    if c.INTERPOLATION not in INTERPOLATION_MODES:
        raise ValueError(f"INPUT.INTERPOLATION {c.INTERPOLATION!r} is not one of {sorted(INTERPOLATION_MODES)}")
    return INTERPOLATION_MODES[c.INTERPOLATION]


def _policy(name):
    return lambda c: T.AutoAugment(T.AutoAugmentPolicy[name])


# In the order in which they act: on the PIL image, then on the tensor. The policies are torchvision's.
ON_IMAGE = {
    "random_translation": lambda c: Random2DTranslation(*c.SIZE),
    "random_crop": lambda c: T.RandomCrop(c.SIZE, padding=c.CROP_PADDING),
    "random_resized_crop": lambda c: T.RandomResizedCrop(c.SIZE, scale=c.RRCROP_SCALE, interpolation=_interpolation(c)),
    "random_flip": lambda c: T.RandomHorizontalFlip(),
    "imagenet_policy": _policy("IMAGENET"),
    "cifar10_policy": _policy("CIFAR10"),
    "svhn_policy": _policy("SVHN"),
    "randaugment": lambda c: T.RandAugment(c.RANDAUGMENT_N, c.RANDAUGMENT_M),
    "colorjitter": lambda c: T.ColorJitter(c.COLORJITTER_B, c.COLORJITTER_C, c.COLORJITTER_S, c.COLORJITTER_H),
    "randomgrayscale": lambda c: T.RandomGrayscale(c.RGS_P),
    "gaussian_blur": lambda c: T.RandomApply([T.GaussianBlur(c.GB_K)], p=c.GB_P),
}
ON_TENSOR = {
    "cutout": lambda c: Cutout(c.CUTOUT_N, c.CUTOUT_LEN),
    "normalize": lambda c: T.Normalize(c.PIXEL_MEAN, c.PIXEL_STD),
    "gaussian_noise": lambda c: GaussianNoise(c.GN_MEAN, c.GN_STD),
    "instance_norm": lambda c: InstanceNormalization(),
}
AT_TEST = ("normalize", "instance_norm")


def build_transform(cfg, is_train=True, choices=None) -> T.Compose | None:
    """The transform that INPUT.TRANSFORMS (or `choices`) names; None with INPUT.NO_TRANSFORM.

    Training: resize to INPUT.SIZE unless a crop is asked for, then the chosen steps in their fixed order.
    Test: the smaller edge to the larger of INPUT.SIZE, centre crop, and the normalisations.
    """
    c = cfg.INPUT
    if c.NO_TRANSFORM:
        print("Note: no transform is applied!")
        return None
    chosen = c.TRANSFORMS if choices is None else choices
    known = {*ON_IMAGE, *ON_TENSOR, "center_crop"}  # center_crop: always done at test, named for old configurations
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"INPUT.TRANSFORMS: {unknown} is not among {sorted(known)}")

    print(f"Building transform_{'train' if is_train else 'test'}")
    if is_train:
        cropped = {"random_crop", "random_resized_crop"} & set(chosen)
        steps = [] if cropped else [T.Resize(c.SIZE, interpolation=_interpolation(c))]
        steps += [make(c) for name, make in ON_IMAGE.items() if name in chosen]
        allowed = ON_TENSOR
    else:
        steps = [T.Resize(max(c.SIZE), interpolation=_interpolation(c)), T.CenterCrop(c.SIZE)]
        allowed = AT_TEST
    steps.append(T.ToTensor())
    steps += [make(c) for name, make in ON_TENSOR.items() if name in chosen and name in allowed]
    for step in steps:
        print(f"+ {type(step).__name__}")
    return T.Compose(steps)
