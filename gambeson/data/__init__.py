"""Data: the doors that images come through, augmentation, the synthetic store and the real + synthetic mixture."""

from gambeson.data.datasets import Cifar10, Data, Digits, ImageFolder, ImageSet, NpzImages, Split, door, load

__all__ = ["Cifar10", "Data", "Digits", "ImageFolder", "ImageSet", "NpzImages", "Split", "door", "load"]
