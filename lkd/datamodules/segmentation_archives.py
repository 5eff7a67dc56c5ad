"""Published datasets of images with masks."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

from torchvision.datasets.utils import download_and_extract_archive

from lkd.datamodules.archives import explained
from lkd.datamodules.base import Split
from lkd.datamodules.mask_files import IGNORED, paired
from lkd.datamodules.segmentation_folder import MaskedFilesDataModule
from lkd.datamodules.transforms.base import BatchTransform, ImageTransform, RandomHorizontalFlip
from lkd.datamodules.transforms.scaling import RandomScaledCrop
from lkd.io.refused import shown

_ADE20K_CLASSES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister,
escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Labels of the evaluated classes of Cityscapes in `labelIds.png`, in the order of their train IDs."""


class SegmentationArchiveDataModule(MaskedFilesDataModule):
    """Base class of published datasets of images with masks. Their validation images are the test set.

    The labels of the published test images are not public. During training, validation images are therefore held out
    from the training images, so that the test set is not used to select a checkpoint.

    Args:
        root: Folder of the dataset.
        download: Whether to download the dataset if it is missing and can be downloaded.
        kwargs: Arguments of `MaskedFilesDataModule`, except `label_map`.

    Attributes:
        title: Name of the dataset.
        archives: Names, sources and target folder of the archives; `{root}` stands for `root`.
    """

    title: ClassVar[str]
    archives: ClassVar[str]

    def __init__(self, root: str = "data", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root, self.download = root, download

    @abstractmethod
    def locate(self) -> Path:
        """Return the folder of the unpacked dataset, which may not exist."""

    @abstractmethod
    def files(self, folder: Path, training: bool) -> tuple[list[str], list[str]]:
        """Find the training or the validation images.

        Args:
            folder: Folder of the unpacked dataset.
            training: Whether to return the training images instead of the validation images.

        Returns:
            Names of the images and of their masks, relative to the folder.
        """

    def fetch(self) -> None:
        """Download and unpack the dataset.

        Raises:
            OSError: If it cannot be downloaded.
        """
        raise OSError("it requires a registration and cannot be downloaded automatically")

    def prepare_data(self) -> None:
        """Download the dataset if it is missing; see `ImageDataModule.prepare_data`."""
        if self.download and not self.locate().is_dir():
            with self._explained():
                self.fetch()
        super().prepare_data()

    def find(self, split: Split) -> tuple[Path, list[str], list[str]] | None:
        """Find the files of a split; see `MaskedFilesDataModule.find`."""
        if split == "val":
            return None
        folder = self.locate()
        with self._explained():
            if not folder.is_dir():
                raise FileNotFoundError(f"folder {shown(folder)} not found")
            return folder, *self.files(folder, split == "train")

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self.title, self.root, self.archives, self.download, "its folder", "shapes/kd")


class VOCSegmentationDataModule(SegmentationArchiveDataModule):
    """Pascal VOC 2012: color images up to 500 pixels wide with masks of 20 classes and the background.

    Args:
        root: Folder of the dataset.
        image_set: Training images: `train` (1,464) or `train_aug` (10,582). The latter requires the masks of Hariharan
            et al. in `SegmentationClassAug/` and their list `ImageSets/Segmentation/train_aug.txt`.
        image_size: Height and width of the training crops, or one number for both.
        kwargs: Arguments of `SegmentationArchiveDataModule`.

    References:
        Everingham et al.: The Pascal Visual Object Classes Challenge, IJCV 2010. Hariharan et al.: Semantic contours
        from inverse detectors, ICCV 2011.
    """

    title = "Pascal VOC 2012"
    archives = (
        "VOCtrainval_11-May-2012.tar (https://host.robots.ox.ac.uk/pascal/VOC/voc2012) into {root}/ and unpack it there"
    )
    num_classes = 21
    class_names = (
        *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
        *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    )

    def __init__(
        self,
        root: str = "data",
        image_set: Literal["train", "train_aug"] = "train",
        image_size: int | tuple[int, int] | None = (512, 512),
        **kwargs: Any,
    ) -> None:
        super().__init__(root, image_size=image_size, **kwargs)
        self.image_set = image_set

    def locate(self) -> Path:
        """Return the folder `VOCdevkit/VOC2012`."""
        root = Path(self.root).expanduser()
        return root if (root / "JPEGImages").is_dir() else root / "VOCdevkit" / "VOC2012"

    def fetch(self) -> None:
        """Download and unpack the archive (2 GB)."""
        download_and_extract_archive(
            "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            self.root,
            md5="6cd6e144f989b92b3379bac3b3de84fd",
        )

    def files(self, folder: Path, training: bool) -> tuple[list[str], list[str]]:
        """Read the list of the images; see `SegmentationArchiveDataModule.files`."""
        listing = folder / "ImageSets" / "Segmentation" / f"{self.image_set if training else 'val'}.txt"
        masks = "SegmentationClassAug" if training and self.image_set == "train_aug" else "SegmentationClass"
        names = listing.read_text(encoding="utf-8").split()
        return [f"JPEGImages/{name}.jpg" for name in names], [f"{masks}/{name}.png" for name in names]


class CityscapesDataModule(SegmentationArchiveDataModule):
    """Cityscapes: 2,975 training and 500 validation images of streets, 2048x1024 pixels, with masks of 19 classes.

    Args:
        root: Folder of the dataset.
        image_size: Height and width of the training crops, or one number for both.
        kwargs: Arguments of `SegmentationArchiveDataModule`.

    References:
        Cordts et al.: The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016 (arXiv 1604.01685).
    """

    title = "Cityscapes"
    archives = (
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip (https://www.cityscapes-dataset.com) into {root}/ "
        "and unpack them there"
    )
    num_classes = 19
    class_names = (
        *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
        *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
    )

    def __init__(
        self, root: str = "data", image_size: int | tuple[int, int] | None = (512, 1024), **kwargs: Any
    ) -> None:
        classes = dict.fromkeys(range(34), IGNORED) | {label: c for c, label in enumerate(_CITYSCAPES_IDS)}
        super().__init__(root, image_size=image_size, label_map=classes, **kwargs)

    def locate(self) -> Path:
        """Return the folder that contains `leftImg8bit` and `gtFine`."""
        root = Path(self.root).expanduser()
        return root / "cityscapes" if (root / "cityscapes" / "leftImg8bit").is_dir() else root

    def files(self, folder: Path, training: bool) -> tuple[list[str], list[str]]:
        """Find the images of all cities; see `SegmentationArchiveDataModule.files`."""
        name = "train" if training else "val"
        images, masks = folder / "leftImg8bit" / name, folder / "gtFine" / name
        return paired(folder, images, masks, ("_leftImg8bit", "_gtFine_labelIds"))


class ADE20KDataModule(SegmentationArchiveDataModule):
    """ADE20K (Scene Parsing): 20,210 training and 2,000 validation images with masks of 150 classes.

    Args:
        root: Folder of the dataset.
        image_size: Height and width of the training crops, or one number for both.
        eval_size: Height and width of images in evaluation; larger images are scaled down to fit. With the default, the
            shorter side of most images is 512 pixels. `None` evaluates at the full size, padded to the largest image.
        kwargs: Arguments of `SegmentationArchiveDataModule`.

    References:
        Zhou et al.: Scene Parsing through ADE20K Dataset, CVPR 2017 (arXiv 1608.05442).
    """

    title = "ADE20K"
    archives = (
        "ADEChallengeData2016.zip (http://data.csail.mit.edu/places/ADEchallenge) into {root}/ and unpack it there"
    )
    num_classes = 150
    class_names = tuple(name.strip() for name in _ADE20K_CLASSES.replace("\n", " ").split(","))

    def __init__(
        self,
        root: str = "data",
        image_size: int | tuple[int, int] | None = (512, 512),
        eval_size: int | tuple[int, int] | None = (683, 683),
        **kwargs: Any,
    ) -> None:
        classes = {0: IGNORED} | {label: label - 1 for label in range(1, self.num_classes + 1)}
        super().__init__(root, image_size=image_size, eval_size=eval_size, label_map=classes, **kwargs)

    def default_augment(self) -> list[ImageTransform | BatchTransform]:
        """Return random scaling of the shorter side around 512 pixels with cropping, and random horizontal flips."""
        return [RandomScaledCrop(side=512), RandomHorizontalFlip()]

    def locate(self) -> Path:
        """Return the folder `ADEChallengeData2016`."""
        root = Path(self.root).expanduser()
        return root if (root / "annotations").is_dir() else root / "ADEChallengeData2016"

    def fetch(self) -> None:
        """Download and unpack the archive (1 GB)."""
        download_and_extract_archive(
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            self.root,
            md5="7328b3957e407ddae1d3cbf487f149ef",
        )

    def files(self, folder: Path, training: bool) -> tuple[list[str], list[str]]:
        """Find the images; see `SegmentationArchiveDataModule.files`."""
        name = "training" if training else "validation"
        return paired(folder, folder / "images" / name, folder / "annotations" / name)
