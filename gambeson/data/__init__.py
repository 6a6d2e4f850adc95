"""Data: the doors that images come through, augmentation, the synthetic store and the real + synthetic mixture."""

from gambeson.data.datasets import Digits, ImageSet, Split, load

__all__ = ["Digits", "ImageSet", "Split", "load"]
