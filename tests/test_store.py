from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lkd.store import cache_folder, checksum, fingerprint, is_whole, replacing, seal


def test_fingerprint_tells_values_types_and_shapes_apart() -> None:
    tensor = torch.arange(6.0)
    others = [tensor + 1e-7, tensor.double(), tensor.view(2, 3), tensor[:5]]
    assert len({fingerprint(part) for part in [tensor, *others]}) == 5
    assert fingerprint(tensor) == fingerprint(tensor.clone()) == fingerprint(torch.stack((tensor, tensor), 1)[:, 0])
    assert fingerprint("a", "b") != fingerprint("ab")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with replacing(path) as written:
        written.write_bytes(b"first")
    before = checksum(path)
    with pytest.raises(TypeError), replacing(path) as written:
        written.write_text(b"no text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"first"
    assert checksum(path) == before != 0
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("LKD_CACHE", "")
    assert cache_folder("images") == Path("/x/lkd/images")
    monkeypatch.setenv("LKD_CACHE", "/mine")
    assert cache_folder("images") == Path("/mine/images")


@pytest.mark.parametrize("content", [b"", b"a", bytes(5000), bytes(range(256)) * 300])
def test_a_sealed_file_that_is_cut_or_changed_is_not_whole(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert not is_whole(path)
    seal(path)
    sealed = path.read_bytes()
    assert is_whole(path)
    assert sealed[:-4] == content
    for size in {0, 1, len(sealed) // 2, len(sealed) - 4, len(sealed) - 1} - {len(sealed)}:
        path.write_bytes(sealed[:size])
        assert not is_whole(path)
    for place in range(0, len(sealed), 97):
        path.write_bytes(sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :])
        assert not is_whole(path)
    path.write_bytes(sealed + b"\0")
    assert not is_whole(path)
