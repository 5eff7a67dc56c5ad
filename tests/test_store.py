from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from lkd.io.tensor_cache import cache_folder, fingerprint, load_tensors, replacing, save_tensors


def test_fingerprint_depends_on_values_types_and_shapes() -> None:
    tensor = torch.arange(6.0)
    others = [tensor + 1e-7, tensor.double(), tensor.view(2, 3), tensor[:5]]
    assert len({fingerprint(part) for part in [tensor, *others]}) == 5
    assert fingerprint(tensor) == fingerprint(tensor.clone()) == fingerprint(torch.stack((tensor, tensor), 1)[:, 0])
    assert fingerprint("a", "b") != fingerprint("ab")


def test_files_are_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with replacing(path) as written:
        written.write_bytes(b"first")
    with pytest.raises(TypeError), replacing(path) as written:
        written.write_text(b"no text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"first"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("LKD_CACHE", "")
    assert cache_folder("images") == Path("/x/lkd/images")
    monkeypatch.setattr("lkd.io.tensor_cache.user_cache_path", lambda *_, **__: Path("~/.cache/lkd"))
    assert cache_folder("images") == Path(tempfile.gettempdir()) / "lkd/images"
    monkeypatch.setenv("LKD_CACHE", "/mine")
    assert cache_folder("images") == Path("/mine/images")


MADE_FROM = {"teacher": "a", "seed": "0"}


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = {
        "logits": torch.randn(50, 7).half(),
        "classes": torch.arange(12).view(3, 4).int(),
        "none": torch.zeros(0),
    }
    path = tmp_path / "stored.safetensors"
    save_tensors(path, tensors, MADE_FROM)
    return path, tensors


def test_tensors_are_restored(stored: tuple[Path, dict[str, torch.Tensor]], recwarn: pytest.WarningsRecorder) -> None:
    path, tensors = stored
    found = load_tensors(path, MADE_FROM)
    assert found is not None
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)
    assert load_tensors(path.with_name("other"), MADE_FROM) is None
    assert not recwarn


def test_different_inputs(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with pytest.warns(
        UserWarning, match=r"stored.safetensors is ignored and will be recreated: .* different inputs: teacher, seed"
    ):
        assert load_tensors(stored[0], {"teacher": "b", "seed": "1"}) is None
    for wanted in ({"teacher": "a"}, {**MADE_FROM, "dtype": "half"}):
        with pytest.warns(UserWarning, match=r"will be recreated: it was created with different inputs: (seed|dtype)$"):
            assert load_tensors(stored[0], wanted) is None


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file(stored: tuple[Path, dict[str, torch.Tensor]], share: float) -> None:
    content = stored[0].read_bytes()
    stored[0].write_bytes(content[: int(share * len(content))])
    with pytest.warns(UserWarning, match="will be recreated"):
        assert load_tensors(stored[0], MADE_FROM) is None


def test_flipped_bits_are_detected(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = stored
    content = path.read_bytes()
    for place in range(len(content)):
        corrupt = bytearray(content)
        corrupt[place] ^= 1 << place % 8
        path.write_bytes(corrupt)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            found = load_tensors(path, MADE_FROM)
        # A bit without effect, such as white space in the header, may be flipped, as long as the tensors are correct.
        assert found is None or all(torch.equal(found[name], tensors[name]) for name in tensors), place


def test_random_file(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 8, 100, 5000):
        stored[0].write_bytes(bytes(torch.randint(256, (size,), generator=generator).tolist()))
        with pytest.warns(UserWarning, match="will be recreated"):
            assert load_tensors(stored[0], MADE_FROM) is None


@pytest.mark.skipif(sys.platform != "linux", reason="requires /proc")
def test_files_are_synchronized_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, a power failure could leave an empty file with this name; the folder is synchronized afterwards."""
    synced: list[tuple[str, bool]] = []
    path = tmp_path / "file"
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append((Path(f"/proc/self/fd/{handle}").resolve().name, path.exists()))
    )
    with replacing(path) as written:
        written.write_bytes(b"new")
        name = written.name
    assert synced == [(name, False), (tmp_path.name, True)]
