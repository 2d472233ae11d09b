"""split: the classes of any data set in experiences of a few each, class-incremental.

Splitting a data set's classes into tasks: Zenke, Poole, Ganguli. Continual Learning Through Synaptic Intelligence.
ICML 2017. https://arxiv.org/abs/1703.04200. With ``--data folders --set data.domains=mnist`` it is Split MNIST (five
experiences of two digits), with a folder of Tiny-ImageNet and ``num_experiences=10`` Split Tiny-ImageNet (Buzzega et
al., https://arxiv.org/abs/2004.07211), and so on for a data set of one's own: a folder of Parquet files with labels 0
to K - 1. ``classes_per_experience="50,10,10,10,10,10"`` is the protocol that begins with half of 100 classes (Hou et
al., CVPR 2019).

Images are resized to the model's input size unless ``data.image_size`` says otherwise: 28 for MNIST, 64 for
Tiny-ImageNet. Brings along the slim ResNet-18 of online continual learning (20 channels), which takes any image size,
and no augmentation: whether an image may be mirrored depends on what it shows.
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.continual.dealing import Classes, class_incremental
from fednorm.continual.spec import ScenarioSpec
from fednorm.continual.stream import Stream
from fednorm.data.benchmarks import Reader


def make(
    reader: Reader,
    seed: int,
    *,
    num_experiences: int = 0,
    classes_per_experience: Classes = "",
    class_order: str = "shuffled",
    order_seed: int | str = "run",
    train_per_experience: int = 0,
    test_per_experience: int = 0,
) -> Stream:
    """Build the stream.

    Args:
        reader: Reads the data.
        seed: The run's seed.
        num_experiences: T; 0 for five, or fewer where some had one class only. Where it does not divide
            the number of classes, the first experiences have one more.
        classes_per_experience: In place of T: a number of classes, or one for each experience, as ``"4,3,3"``.
        class_order: ``shuffled`` by the seed, or ``sorted``.
        order_seed: Of the class order: ``run`` for the run's seed, or a number.
        train_per_experience: Most training images an experience; 0 for all.
        test_per_experience: Most test images an experience; 0 for all.

    Raises:
        ConfigError: More experiences than classes, or numbers of classes that do not sum up to all of them.
        DataError: The data is missing or corrupt, or several data sets.
    """
    return class_incremental(
        "split",
        reader,
        seed,
        num_experiences=num_experiences,
        classes_per_experience=classes_per_experience,
        class_order=class_order,
        order_seed=order_seed,
        train=train_per_experience,
        test=test_per_experience,
        usual=0,
    )


SPEC = ScenarioSpec(
    name="split",
    summary="The classes of any data set, a few an experience; --data says which (folders for one's own).",
    citation=Citation(
        title="Continual Learning Through Synaptic Intelligence",
        authors="Zenke, Poole, Ganguli",
        year=2017,
        arxiv="1703.04200",
    ),
    make=make,
    defaults={"model": {"name": "resnet18", "width": 20}},
)
