"""Text classification: distill a small transformer into a smaller one.

The task is to predict which library a docstring comes from. The texts are real and need no download: docstrings of
lkd's dependencies and of Python's standard library, read from the installed source files. Results vary slightly between
versions of these packages.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lkd.features.layers import FeatureLayers
from lkd.types import IGNORE_INDEX

LIBRARIES = ("standard library", "numpy", "scipy", "sklearn", "torch")
NAMES = re.compile(r"\b(python|numpy|np|scipy|sklearn|scikit|learn|py|torch|pytorch)\b")  # would reveal the class
VOCABULARY = 4096


class Sample(NamedTuple):
    """A tokenized text."""

    words: Tensor  # (L,) int64, variable length
    target: int
    index: int


@cache
def read_corpus(per_library: int, length: int) -> dict[str, list[Sample]]:
    """Read the docstrings by split. All texts from a source file are in the same split.

    Args:
        per_library: Maximum number of texts per library.
        length: Maximum number of words per text; longer texts are truncated.
    """
    splits: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    index = 0
    for target, library in enumerate(LIBRARIES):
        for number, (file, words) in enumerate(_texts(library)):
            if number == per_library:
                break
            part = zlib.crc32(file.encode()) % 10
            split = "val" if part == 0 else "test" if part in (1, 2) else "train"
            splits[split].append(Sample(torch.tensor(words[:length]), target, index))
            index += 1
    return splits


def _texts(library: str) -> Iterator[tuple[str, list[int]]]:
    """Yield the file name and the token ids of each docstring with at least 8 words."""
    spec = None if library == LIBRARIES[0] else importlib.util.find_spec(library)
    folder = Path(sysconfig.get_path("stdlib") if spec is None else str(spec.origin)).resolve()
    folder = folder if spec is None else folder.parent
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*.py")}
    for name in sorted(files, key=lambda name: zlib.crc32(name.encode())):  # spread over the whole library
        if "site-packages" in name or "test" in name or files[name].stat().st_size > 200_000:
            continue
        try:
            tree = ast.parse(files[name].read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = NAMES.sub(" ", (ast.get_docstring(node) or "").lower())
                words = [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in re.findall("[a-z]+", text)]
                if len(words) >= 8:
                    yield name, words


class DocstringDataModule(L.LightningDataModule):
    """Docstrings of five libraries.

    A batch is a dict with the keys `input`, `target` and `index`, which lkd's modules accept directly. The input is a
    dict of `words` `(B, L)` and `mask` `(B, L)`, padded to the longest text of the batch.

    Args:
        batch_size: Number of texts per batch.
        label_size: Number of training texts that keep their label; `None` keeps all labels.
        drop_unlabelled: Train only on labelled texts, repeated so that the number of steps is the same.
        per_library: Maximum number of texts per library.
        length: Maximum number of words per text.
    """

    num_classes = len(LIBRARIES)
    class_names = LIBRARIES

    def __init__(
        self,
        batch_size: int = 64,
        label_size: int | None = None,
        drop_unlabelled: bool = False,
        per_library: int = 2000,
        length: int = 32,
    ) -> None:
        super().__init__()
        self.batch_size, self.label_size, self.drop_unlabelled = batch_size, label_size, drop_unlabelled
        self.per_library, self.length = per_library, length
        # A blank input, from which lkd infers the output shapes of the networks' layers.
        blank = {"words": torch.zeros(1, length, dtype=torch.int64), "mask": torch.ones(1, length, dtype=torch.bool)}
        self.example_input = blank

    def setup(self, stage: str) -> None:
        """Read the texts and remove labels beyond `label_size`."""
        self.splits = dict(read_corpus(self.per_library, self.length))
        if self.label_size is None:
            return
        texts = self.splits["train"]
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
        labelled = set(order[: self.label_size])
        if self.drop_unlabelled:
            few = [texts[number] for number in sorted(labelled)]
            self.splits["train"] = (few * (len(texts) // len(few) + 1))[: len(texts)]
        else:
            self.splits["train"] = [
                text if number in labelled else text._replace(target=IGNORE_INDEX) for number, text in enumerate(texts)
            ]

    def _loader(self, split: str) -> DataLoader[Sample]:
        training = split == "train"
        return DataLoader(
            self.splits[split],  # type: ignore[arg-type]
            batch_size=self.batch_size,  # a keyword argument, because Lightning recreates the loader for predict
            shuffle=training,
            drop_last=training,
            collate_fn=collate,
        )

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return the loader of the training texts, shuffled."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return the loader of the validation texts."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return the loader of the test texts."""
        return self._loader("test")

    predict_dataloader = test_dataloader


def collate(samples: list[Sample]) -> dict[str, Tensor | dict[str, Tensor]]:
    """Pad texts of different lengths to a batch."""
    words = pad_sequence([sample.words for sample in samples], batch_first=True)
    return {
        "input": {"words": words, "mask": words != 0},
        "target": torch.tensor([sample.target for sample in samples]),
        "index": torch.tensor([sample.index for sample in samples]),
    }


class Transformer(nn.Module):
    """Transformer encoder with mean pooling over the words and a linear classifier.

    Args:
        width: Embedding dimension.
        depth: Number of layers.
        num_classes: Number of classes.
        length: Maximum number of words.
        dropout: Dropout probability.
    """

    def __init__(
        self, width: int, depth: int, num_classes: int = len(LIBRARIES), length: int = 32, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.head = nn.Linear(width, num_classes)
        # The layers that @stages, @pooled and @head refer to, for criteria that read them.
        stages = tuple(f"layers.{number}" for number in range(depth))
        self.feature_layers = FeatureLayers(stages=stages, pooled="head:input", head="head")

    def forward(self, input: dict[str, Tensor]) -> Tensor:
        """Compute the logits `(B, K)` from `words` and `mask`, both `(B, L)`."""
        words, mask = input["words"], input["mask"]
        state = self.words(words) + self.places[: words.shape[1]]
        for layer in self.layers:
            state = layer(state, src_key_padding_mask=~mask)
        weight = mask[..., None].to(state.dtype)
        return self.head((state * weight).sum(1) / weight.sum(1))
