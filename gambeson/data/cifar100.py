"""CIFAR-100 (Krizhevsky 2009) as distributed: 100 fine classes, or the 20 coarse ones that they belong to."""

from __future__ import annotations

from dataclasses import dataclass

from gambeson.data.assembly import assembled, check_counts, chosen
from gambeson.data.cifar import Form, distributed, parse_batch, parse_records
from gambeson.data.imageset import ImageSet
from gambeson.errors import require

FINE = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip
COARSE = (
    "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices",
    "household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes", "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates",
    "people", "reptiles", "small_mammals", "trees", "vehicles_1", "vehicles_2",
)  # fmt: skip
"""The classes in the order of their labels, as the archive's `meta` has them."""


def _forms(coarse: bool) -> tuple[Form, ...]:
    key = b"coarse_labels" if coarse else b"fine_labels"
    return (
        Form(
            folder="cifar-100-python",
            archive="cifar-100-python.tar.gz",
            files={"train": ("train",), "test": ("test",)},
            read=lambda content, where: parse_batch(content, where, key),
        ),
        Form(
            folder="cifar-100-binary",
            archive="cifar-100-binary.tar.gz",
            files={"train": ("train.bin",), "test": ("test.bin",)},
            read=lambda content, where: parse_records(content, where, 2, 0 if coarse else 1),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Cifar100:
    """60,000 photographs of 100 kinds of things, 32x32; 10,000 of them are its test part."""

    coarse: bool = False  # the 20 groups of classes instead of the 100 classes
    side: int = 32  # pixels: 32, or 16 (each the mean of 2x2)
    train_images: int = 0  # real training images, the same number of each class; 0: all that are not held out
    validation_images: int = 1000  # images of train held out for curves and choices, stratified
    split_seed: int = 0  # seed of the split, the same for every run seed

    def __post_init__(self) -> None:
        require(self.side in (16, 32), "data.side", "32, or 16 (averaged)", self.side)
        check_counts(self.validation_images, self.train_images, len(self._names), 40_000)

    @property
    def _names(self) -> tuple[str, ...]:
        return COARSE if self.coarse else FINE

    def load(self) -> ImageSet:
        """The image set from the data root, where its archive (python or binary) lies as it is or unpacked.

        Raises UserError where it is not there or damaged.
        """
        forms = _forms(self.coarse)
        train, test = (distributed("cifar100", forms, part, len(self._names)) for part in ("train", "test"))
        split = self.validation_images, self.train_images, self.split_seed
        where = chosen("cifar100", train.labels, test.labels, self._names, *split)
        name = "cifar100" + ("-coarse" if self.coarse else "") + (f"-{self.side}" if self.side < 32 else "")
        return assembled(name, train, test, self._names, where, self.side, flip_safe=True)
