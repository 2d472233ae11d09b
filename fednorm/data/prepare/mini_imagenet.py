"""mini-ImageNet: 100 classes of 600 images. Vinyals et al., Matching Networks, 2016, as Ravi, Larochelle cut it.

https://arxiv.org/abs/1606.04080. Three lists of ``filename,label`` say which classes are for meta-training, validation
and testing. A stream needs training and test images of each class instead, and those of online continual learning are
taken (Mai et al., Online Continual Learning in Image Classification, https://arxiv.org/abs/2101.10423): the classes of
the three lists one after another, and of each class the first sixth of its images, 100, for testing. The files
``mini-imagenet-cache-*.pkl`` are pickles, which run code when they are opened; they are not read.
"""

from __future__ import annotations

from collections.abc import Iterator

from fednorm.data.prepare.files import Files
from fednorm.data.prepare.recipe import Archive, Images, Recipe, Row, Wanted
from fednorm.errors import DataError

LISTS = ("train.csv", "val.csv", "test.csv")
TEST_SHARE = 6
"""One image in so many is tested on."""

NOTE = "mini_imagenet: of each class the first sixth of its images is tested on, as in online continual learning."


def _images(files: Files, wanted: Wanted) -> Iterator[Images]:
    of_class: dict[str, list[str]] = {}
    for name in LISTS:
        own: dict[str, list[str]] = {}
        for _, (image, label) in files.table(name, ("filename", "label"), files.root(name)):
            own.setdefault(label, []).append(image)
        of_class |= {label: own[label] for label in sorted(own)}
    classes = wanted.of_classes(tuple(of_class))
    places = {path.rpartition("/")[2]: path for path in reversed(list(files))}

    def rows() -> Iterator[Row]:
        for label, name in enumerate(classes):
            paths = of_class[name]
            for number, image in enumerate(paths):
                if image not in places:
                    raise DataError(f"{files.place} has no file {image}, which its lists name")
                yield Row(places[image], label, "test" if number < len(paths) // TEST_SHARE else "train")

    yield Images("mini_imagenet", classes, rows(), (NOTE,))


RECIPE = Recipe(
    name="mini_imagenet",
    title="mini-ImageNet",
    source="https://github.com/yaoyao-liu/mini-imagenet-tools",
    archives=(Archive("mini-imagenet.zip"), Archive("images.zip")),
    images=_images,
    folders=("mini_imagenet",),
    layout="train.csv, val.csv, test.csv of filename,label, and the images they name",
    has_classes=True,
)
