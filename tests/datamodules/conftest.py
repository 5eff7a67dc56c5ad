from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def write_tree(tmp_path):
    """Writes `{split: {class: number of images}}` as JPEG files, each image of its own size and colour.

    None is so large that it would be decoded at half its size for 18 pixels."""

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
