"""Images in tar files in WebDataset format: `<name>.jpg`, followed by `<name>.cls`."""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlparse

from lkd.datamodules.dataset import ImageError
from lkd.datamodules.files import few
from lkd.io.refused import said, shown

_IMAGES, _LABEL = ("jpg", "jpeg", "png", "webp"), "cls"
_REMOTE = ("http", "https", "ftps", "sftp", "scp", "gs", "htgs", "hf", "ais")
"""URL schemes that WebDataset opens, except for `pipe:`, which runs a command."""


class Sample(NamedTuple):
    """A stored image.

    Attributes:
        name: Shard, and name of the sample in it.
        image: Encoded bytes of the image file.
        label: Class of the image.
    """

    name: str
    image: bytes
    label: int


def require_webdataset() -> None:
    """Check that the optional dependency WebDataset is installed.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "WebDatasetDataModule requires webdataset, which is not installed; run pip install "
            "'lightning-kd[webdataset]'"
        ) from error


def find_shards(pattern: str) -> tuple[str, ...]:
    """Return the shards that match a pattern, in its order.

    Args:
        pattern: A folder that contains `*.tar` files; or paths and URLs in brace notation (`{0000..0099}`, separated by
            `::`). Paths may also contain `*` and `?`.

    Raises:
        FileNotFoundError: If nothing matches or a file is missing.
        ValueError: If the pattern is invalid.
    """
    from webdataset.shardlists import expand_urls

    try:
        parts = expand_urls(pattern)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"invalid pattern of shards {shown(pattern)} ({said(error)}); correct its braces") from error
    shards = [shard for part in parts for shard in _expanded(part)]
    if not shards:
        raise FileNotFoundError(f"no shards match {shown(pattern)}; expected a folder with *.tar files, or a pattern")
    missing = [shard for shard in shards if not _is_remote(shard) and not Path(shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(shards)} shards not found: {few(missing)}; correct the path")
    return tuple(shards)


def _expanded(part: str) -> list[str]:
    if _is_remote(part):
        return [part]
    if Path(part).is_dir():
        return sorted(str(path) for path in Path(part).glob("*.tar"))
    return sorted(glob.glob(part)) if glob.has_magic(part) else [part]  # noqa: PTH207  # supports absolute patterns


def _is_remote(shard: str) -> bool:
    scheme = urlparse(shard).scheme
    if scheme in _REMOTE:
        return True
    if len(scheme) > 1 and (":" in shard and not Path(shard).exists()):  # a single letter is a Windows drive
        raise ValueError(f"shards must be files, or URLs that begin with {', '.join(_REMOTE)}; got {shown(shard)}")
    return False


def read_shard(shard: str, num_classes: int, unlabelled: int) -> Iterator[Sample]:
    """Yield the samples of a shard in order. Only images and classes are read, and nothing is unpickled.

    Args:
        shard: Path or URL.
        num_classes: Number of classes; they are 0 to `num_classes - 1`.
        unlabelled: Class of an image without a label.

    Raises:
        ImageError: If the shard is truncated or corrupt, or a sample has no image or an invalid class.
    """
    from webdataset.tariterators import group_by_keys

    empty = True
    try:
        with closing(_opened(shard)) as stream:
            for members in group_by_keys(_members(stream, shard), handler=_raise):
                empty = False
                yield _sample(members, f"{shard}: {members['__key__']}", num_classes, unlabelled)
    except ImageError:
        raise
    except Exception as error:  # readers raise almost any exception for corrupt files
        reason = f"{type(error).__name__}: {said(error)}"
        raise ImageError(
            f"shard {shown(shard)} cannot be read ({reason}); replace it with a complete, uncompressed tar file"
        ) from error
    if empty:
        raise ImageError(f"shard {shown(shard)} has no samples; remove it from the pattern")


def _opened(shard: str) -> Any:
    from webdataset.gopen import gopen

    return gopen(shard) if _is_remote(shard) else Path(shard).open("rb")


class _Header(tarfile.TarInfo):
    """Tar header that raises an error for corrupt or truncated shards, where `tarfile` would end the iteration."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,}") from error


def _members(stream: IO[bytes], shard: str) -> Iterator[dict[str, Any]]:
    """Yield name and bytes of each member in the format of `group_by_keys`; the bytes of unused members are not read.

    WebDataset's own reader decompresses compressed files and expands sparse ones, so a few bytes may fill the memory.
    """
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # otherwise the list of members grows without bound
            if not member.isreg() or member.issparse() or member.name.startswith("__"):
                continue
            suffix = member.name.rpartition("/")[2].partition(".")[2].lower()
            file = tar.extractfile(member) if suffix in (*_IMAGES, _LABEL) else None
            yield {"fname": member.name, "data": b"" if file is None else file.read(), "__url__": shard}


def _raise(error: Exception) -> bool:
    error.args = error.args[:1]  # WebDataset appends its stream to the message
    raise error


def _sample(members: dict[str, Any], name: str, num_classes: int, unlabelled: int) -> Sample:
    where = f"sample {shown(name)}"
    found = [suffix for suffix in _IMAGES if suffix in members]
    if len(found) != 1:
        raise ImageError(f"{where} has {len(found)} images; expected one of {', '.join(_IMAGES)} next to its .{_LABEL}")
    if _LABEL not in members:
        raise ImageError(f"{where} has no class; expected a number in a .{_LABEL} member directly before or after it")
    text: bytes = members[_LABEL]
    try:
        label = int(text)
    except ValueError as error:
        raise ImageError(f"{where} has the class {shown(text)}; expected a number") from error
    if label != unlabelled and not 0 <= label < num_classes:
        raise ImageError(
            f"{where} has the class {label}, which is not one of the {num_classes} classes 0 to {num_classes - 1}; "
            f"correct it or num_classes, or use {unlabelled} for images without a label"
        )
    return Sample(name, members[found[0]], label)
