"""Datasets that torchvision downloads. Each can also be read from a folder of image files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision
from torch.utils.data import TensorDataset

from lkd.datamodules.base import ImageDataModule, Split
from lkd.datamodules.files import class_folders, few, read_tree, split_folder
from lkd.datamodules.sources import ImageSource
from lkd.datamodules.transforms.base import BatchTransform, ImageTransform, RandomCrop, RandomHorizontalFlip

_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter
palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower
sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


class ArchiveDataModule(ImageDataModule):
    """Base class of published datasets that can be downloaded.

    If the folder contains images in `train/<class>/` and `test/<class>/` (or `val/<class>/`), these are read instead of
    the archive.

    Args:
        root: Folder of the dataset.
        download: Whether to download the dataset if it is missing.
        kwargs: Arguments of `ImageDataModule`.

    Attributes:
        title: Name of the dataset.
        archives: Names, sources and target folder of the archives for a manual download; `{root}` stands for `root`.
    """

    title: ClassVar[str]
    archives: ClassVar[str]

    def __init__(self, root: str = "data", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.download = download

    @abstractmethod
    def read(self, train: bool, download: bool) -> ImageSource:
        """Open the archive.

        Args:
            train: Whether to return the training images or the test images.
            download: Whether to download the archive.
        """

    def tree(self) -> Path | None:
        """Return the folder of image files, or `None` if there is none."""
        return Path(self.root) if (Path(self.root) / "train").is_dir() else None

    def fetch(self) -> None:
        """Download the archive into the folder."""
        for train in (True, False):
            self.read(train, download=True)

    def prepare_data(self) -> None:
        """Download the archive, unless a folder of image files exists; its images are decoded instead."""
        if self.download and self.tree() is None:
            with self._explained():
                self.fetch()
        super().prepare_data()

    def setup(self, stage: str) -> None:
        """Find the classes of a folder of image files, and open the splits that a stage needs."""
        tree = self.tree()
        if tree is not None:
            self.class_names = self._classes(tree / "train")
        super().setup(stage)

    def _classes(self, folder: Path) -> tuple[str, ...]:
        """Return the class names of the folder, in the class order of the dataset if it is known."""
        found = class_folders(folder)
        if len(found) != self.num_classes:
            raise ValueError(
                f"{folder} has {len(found)} class folders, but {self.title} has {self.num_classes} classes; "
                "use ImageFolderDataModule for other images, or set another root"
            )
        if set(found) == set(self.class_names):
            return self.class_names
        if all(name.isdecimal() for name in found):
            return tuple(sorted(found, key=int))
        if set(found) & set(self.class_names):  # sorting would change the class order, which must match the teacher's
            unknown, missing = sorted(set(found) - set(self.class_names)), sorted(set(self.class_names) - set(found))
            raise ValueError(
                f"{folder} has class folders that are not classes of {self.title}: {few(unknown)}; rename them to "
                f"{few(missing)}, or rename all folders to the class numbers 0 to {self.num_classes - 1}"
            )
        return found

    def make_dataset(self, split: Split) -> ImageSource | None:
        """Open the images of a split; see `ImageDataModule.make_dataset`."""
        tree = self.tree()
        if tree is not None:
            folder = split_folder(tree, split)
            return None if folder is None else read_tree(folder, self.class_names)
        if split == "val":
            return None
        with self._explained():
            return self.read(split == "train", download=False)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        alternative = "a folder with images in train/<class>/ and test/<class>/"
        with explained(self.title, self.root, self.archives, self.download, alternative, "digits/kd"):
            yield


@contextmanager
def explained(title: str, root: str, archives: str, download: bool, alternative: str, offline: str) -> Iterator[None]:
    """Context manager that replaces the error for a missing or incomplete dataset with one that states the remedy.

    Args:
        title: Name of the dataset.
        root: Folder of the dataset.
        archives: Names, sources and target folder of the archives; `{root}` stands for `root`.
        download: Whether a download was allowed.
        alternative: Description of what `root` may be instead.
        offline: Config that requires no download.

    Raises:
        FileNotFoundError: If the dataset is missing.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # URLError, or RuntimeError if all mirrors fail
        reason = " ".join(str(error).split())[:200] if download else "download is disabled"
        raise FileNotFoundError(
            f"{title} was not found in {root} ({reason}); put {archives.format(root=root)}, or set root to "
            f"{alternative}; configs/{offline}.yaml needs no download"
        ) from error


def _in_memory(images: Any, targets: Any) -> TensorDataset:
    return TensorDataset(torch.as_tensor(images).contiguous(), torch.as_tensor(targets))


class CIFAR10DataModule(ArchiveDataModule):
    """CIFAR-10: 60,000 color images of 32x32 pixels in 10 classes.

    References:
        Krizhevsky: Learning multiple layers of features from tiny images (2009).
    """

    title = "CIFAR-10"
    archives = "cifar-10-python.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) into {root}/"
    num_classes = 10
    class_names: tuple[str, ...] = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    input_shape = (3, 32, 32)
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)

    def default_augment(self) -> list[ImageTransform | BatchTransform]:
        """Return shifts by up to four pixels and horizontal flips."""
        return [RandomCrop(padding=4), RandomHorizontalFlip()]

    def read(self, train: bool, download: bool) -> ImageSource:
        """Read the archive; see `ArchiveDataModule.read`."""
        data = torchvision.datasets.CIFAR10(self.root, train=train, download=download)
        return _in_memory(data.data.transpose(0, 3, 1, 2), data.targets)


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: 60,000 color images of 32x32 pixels in 100 classes.

    References:
        Krizhevsky: Learning multiple layers of features from tiny images (2009).
    """

    title = "CIFAR-100"
    archives = "cifar-100-python.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) into {root}/"
    num_classes = 100
    class_names = tuple(_CIFAR100_CLASSES.split())
    mean = (0.5071, 0.4867, 0.4408)
    std = (0.2675, 0.2565, 0.2761)

    def read(self, train: bool, download: bool) -> ImageSource:
        """Read the archive; see `ArchiveDataModule.read`."""
        data = torchvision.datasets.CIFAR100(self.root, train=train, download=download)
        return _in_memory(data.data.transpose(0, 3, 1, 2), data.targets)


class MNISTDataModule(ArchiveDataModule):
    """MNIST: 70,000 grayscale images of handwritten digits, 28x28 pixels.

    References:
        LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition (1998).
    """

    title = "MNIST"
    archives = (
        "the four files {{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte.gz "
        "(https://yann.lecun.com/exdb/mnist) into {root}/MNIST/raw/"
    )
    num_classes = 10
    class_names = tuple("0123456789")
    input_shape = (1, 28, 28)
    mean = (0.1307,)
    std = (0.3081,)

    def default_augment(self) -> list[ImageTransform | BatchTransform]:
        """Return shifts by up to two pixels."""
        return [RandomCrop(padding=2)]

    def read(self, train: bool, download: bool) -> ImageSource:
        """Read the archive; see `ArchiveDataModule.read`."""
        data = torchvision.datasets.MNIST(self.root, train=train, download=download)
        return _in_memory(data.data.unsqueeze(1), data.targets)


class FashionMNISTDataModule(MNISTDataModule):
    """Fashion-MNIST: 70,000 grayscale images of clothes, 28x28 pixels, in 10 classes.

    References:
        Xiao, Rasul, Vollgraf: Fashion-MNIST (2017), arXiv:1708.07747.
    """

    title = "Fashion-MNIST"
    archives = (
        "the four files {{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte.gz "
        "(https://github.com/zalandoresearch/fashion-mnist) into {root}/FashionMNIST/raw/"
    )
    class_names = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )
    mean = (0.2860,)
    std = (0.3530,)

    def default_augment(self) -> list[ImageTransform | BatchTransform]:
        """Return shifts by up to two pixels and horizontal flips."""
        return [RandomCrop(padding=2), RandomHorizontalFlip()]

    def read(self, train: bool, download: bool) -> ImageSource:
        """Read the archive; see `ArchiveDataModule.read`."""
        data = torchvision.datasets.FashionMNIST(self.root, train=train, download=download)
        return _in_memory(data.data.unsqueeze(1), data.targets)


class SVHNDataModule(ArchiveDataModule):
    """Street View House Numbers: 99,289 color images of digits, 32x32 pixels.

    References:
        Netzer et al.: Reading digits in natural images with unsupervised feature learning (2011).
    """

    title = "SVHN"
    archives = "train_32x32.mat and test_32x32.mat (http://ufldl.stanford.edu/housenumbers) into {root}/"
    num_classes = 10
    class_names = tuple("0123456789")
    input_shape = (3, 32, 32)
    mean = (0.4377, 0.4438, 0.4728)
    std = (0.1980, 0.2010, 0.1970)

    def default_augment(self) -> list[ImageTransform | BatchTransform]:
        """Return shifts by up to four pixels."""
        return [RandomCrop(padding=4)]

    def read(self, train: bool, download: bool) -> ImageSource:
        """Read the archive; see `ArchiveDataModule.read`."""
        data = torchvision.datasets.SVHN(self.root, split="train" if train else "test", download=download)
        return _in_memory(data.data, data.labels)


class STL10DataModule(ArchiveDataModule):
    """STL-10: 13,000 labelled color images of 96x96 pixels in 10 classes. Its unlabelled images are not used.

    References:
        Coates, Lee, Ng: An analysis of single-layer networks in unsupervised feature learning (2011).
    """

    title = "STL-10"
    archives = "stl10_binary.tar.gz (https://cs.stanford.edu/~acoates/stl10) into {root}/"
    num_classes = 10
    class_names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    input_shape = (3, 96, 96)
    mean = (0.4467, 0.4398, 0.4066)
    std = (0.2603, 0.2566, 0.2713)

    def default_augment(self) -> list[ImageTransform | BatchTransform]:
        """Return shifts by up to twelve pixels and horizontal flips."""
        return [RandomCrop(padding=12), RandomHorizontalFlip()]

    def read(self, train: bool, download: bool) -> ImageSource:
        """Read the archive; see `ArchiveDataModule.read`."""
        data = torchvision.datasets.STL10(self.root, split="train" if train else "test", download=download)
        return _in_memory(data.data, data.labels)
