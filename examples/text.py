"""Text: which library does a docstring come from? A small transformer teaches a smaller one.

The texts are real, and on every machine that has lkd: docstrings of the packages that it needs and of Python's standard
library, read from their source files. Other versions of these have other docstrings, so figures move a little.
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
NAMES = re.compile(r"\b(python|numpy|np|scipy|sklearn|scikit|learn|py|torch|pytorch)\b")  # they would give it away
VOCABULARY = 4096


class Sample(NamedTuple):
    """A text as numbers."""

    words: Tensor  # (L,) int64; as long as the text
    target: int
    index: int


@cache
def read_corpus(per_library: int, length: int) -> dict[str, list[Sample]]:
    """Texts by split; texts of one source file are in one split.

    Args:
        per_library: How many texts of each library, at most.
        length: Words that are read of a text, from its beginning.
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
    """Name of the file and numbers of the words, of each docstring that has some words."""
    spec = None if library == LIBRARIES[0] else importlib.util.find_spec(library)
    folder = Path(sysconfig.get_path("stdlib") if spec is None else str(spec.origin)).resolve()
    folder = folder if spec is None else folder.parent
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*.py")}
    for name in sorted(files, key=lambda name: zlib.crc32(name.encode())):  # from all over the library
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

    A batch is a dict: `input`, again a dict of `words` (B, L) and `mask` (B, L), padded to its longest text; `target`
    and `index`. That is what lkd's modules take as it is.

    Args:
        batch_size: Texts in a batch.
        label_size: How many training texts keep their label; None: all.
        drop_unlabelled: Leave the others out of training: the few are then repeated, for as many steps.
        per_library: How many texts of each library.
        length: Words that are read of a text.
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
        # One blank input: from it lkd learns what the networks' layers return.
        blank = {"words": torch.zeros(1, length, dtype=torch.int64), "mask": torch.ones(1, length, dtype=torch.bool)}
        self.example_input = blank

    def setup(self, stage: str) -> None:
        """Read the texts, and hide labels."""
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
            batch_size=self.batch_size,  # by name, as Lightning repeats it for predict
            shuffle=training,
            drop_last=training,
            collate_fn=collate,
        )

    def train_dataloader(self) -> DataLoader[Sample]:
        """Training texts, shuffled."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Sample]:
        """Validation texts."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Test texts."""
        return self._loader("test")

    predict_dataloader = test_dataloader


def collate(samples: list[Sample]) -> dict[str, Tensor | dict[str, Tensor]]:
    """Texts of several lengths as a batch."""
    words = pad_sequence([sample.words for sample in samples], batch_first=True)
    return {
        "input": {"words": words, "mask": words != 0},
        "target": torch.tensor([sample.target for sample in samples]),
        "index": torch.tensor([sample.index for sample in samples]),
    }


class Transformer(nn.Module):
    """Embeddings, transformer layers, the mean over the words, a linear classifier.

    Args:
        width: Numbers for a word.
        depth: Layers.
        num_classes: Classes.
        length: Words at most.
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
        # Which layers @stages, @pooled and @head are, for criteria that read them.
        stages = tuple(f"layers.{number}" for number in range(depth))
        self.feature_layers = FeatureLayers(stages=stages, pooled="head:input", head="head")

    def forward(self, input: dict[str, Tensor]) -> Tensor:
        """Logits `(B, K)` of `words` and `mask`, both `(B, L)`."""
        words, mask = input["words"], input["mask"]
        state = self.words(words) + self.places[: words.shape[1]]
        for layer in self.layers:
            state = layer(state, src_key_padding_mask=~mask)
        weight = mask[..., None].to(state.dtype)
        return self.head((state * weight).sum(1) / weight.sum(1))
