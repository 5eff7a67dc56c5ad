from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lkd.datamodules import ImageFolderDataModule
from tests.datamodules.sources import in_memory


@pytest.fixture
def write_tree(tmp_path):
    """Return a function that writes `{split: {class: number of images}}` as JPEG files of random sizes and pixels.

    The images are too small to be decoded at reduced size for 18 pixels.
    """

    def write(counts, size=None, root=tmp_path):
        rng = np.random.default_rng(0)
        for split, classes in counts.items():
            for name, number in classes.items():
                folder = Path(root, split, name)
                folder.mkdir(parents=True)
                for i in range(number):
                    shape = size or tuple(rng.integers(20, 36, size=2))
                    pixels = rng.integers(256, size=(*shape, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i:04}.jpg", quality=95)
        return str(root)

    return write


@pytest.fixture
def make(request, write_tree):
    """Return a function that creates a data module, with images in memory or with files of different sizes."""
    if request.param != "files":
        return partial(in_memory, (3, 9, 9 if request.param == "square" else 7))
    root = write_tree({"train": {"cat": 45, "dog": 45}, "test": {"cat": 12, "dog": 11}})
    return lambda **kwargs: ImageFolderDataModule(root, 24, **{"num_workers": 0, **kwargs})
