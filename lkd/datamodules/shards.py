"""Images in tar files, as WebDataset has them: `<name>.jpg` and `<name>.cls`, one behind the other."""

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
"""What WebDataset opens beside files, but for `pipe:`, which runs a command."""


class Sample(NamedTuple):
    """An image as it is stored.

    Attributes:
        name: Its shard and its name in it.
        image: The image file's bytes.
        label: Its class.
    """

    name: str
    image: bytes
    label: int


def require_webdataset() -> None:
    """Refuse to go on without the extra.

    Raises:
        ValueError: If WebDataset is not installed.
    """
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "WebDatasetDataModule needs webdataset, which is not installed; pip install 'lkd[webdataset]'"
        ) from error


def find_shards(pattern: str) -> tuple[str, ...]:
    """The shards that a pattern stands for, in its order.

    Args:
        pattern: A folder with `*.tar` in it; or paths and URLs in brace notation (`{0000..0099}`, several divided by
            `::`), in paths `*` and `?` too.

    Raises:
        FileNotFoundError: If there are none, or a file is missing.
        ValueError: If the pattern is none.
    """
    from webdataset.shardlists import expand_urls

    try:
        parts = expand_urls(pattern)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{shown(pattern)} is no pattern of shards ({said(error)}); correct its braces") from error
    shards = [shard for part in parts for shard in _expanded(part)]
    if not shards:
        raise FileNotFoundError(f"no shards match {shown(pattern)}; expected a folder with *.tar in it, or a pattern")
    missing = [shard for shard in shards if not _is_remote(shard) and not Path(shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(shards)} shards are missing: {few(missing)}; correct the path")
    return tuple(shards)


def _expanded(part: str) -> list[str]:
    if _is_remote(part):
        return [part]
    if Path(part).is_dir():
        return sorted(str(path) for path in Path(part).glob("*.tar"))
    return sorted(glob.glob(part)) if glob.has_magic(part) else [part]  # noqa: PTH207  # absolute patterns, too


def _is_remote(shard: str) -> bool:
    scheme = urlparse(shard).scheme
    if scheme in _REMOTE:
        return True
    if len(scheme) > 1 and (":" in shard and not Path(shard).exists()):  # one letter is a drive
        raise ValueError(f"shards are files, or URLs that begin with {', '.join(_REMOTE)}; got {shown(shard)}")
    return False


def read_shard(shard: str, num_classes: int, unlabelled: int) -> Iterator[Sample]:
    """The samples of a shard, in its order. Of its members only images and classes are read, and nothing is unpickled.

    Args:
        shard: Path or URL.
        num_classes: Classes are 0 to `num_classes - 1`.
        unlabelled: The class of an image without a label.

    Raises:
        ImageError: If the shard cannot be read to its end, or a sample has no image or no such class.
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
    except Exception as error:  # readers of broken files raise nearly every kind there is
        reason = f"{type(error).__name__}: {said(error)}"
        raise ImageError(
            f"shard {shown(shard)} cannot be read ({reason}); expected a whole tar file, not compressed: replace it"
        ) from error
    if empty:
        raise ImageError(f"shard {shown(shard)} has no samples; leave it out")


def _opened(shard: str) -> Any:
    from webdataset.gopen import gopen

    return gopen(shard) if _is_remote(shard) else Path(shard).open("rb")


class _Header(tarfile.TarInfo):
    """Of a shard that is damaged or cut off: an error, and not, as tarfile has it, the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,}") from error


def _members(stream: IO[bytes], shard: str) -> Iterator[dict[str, Any]]:
    """Name and bytes of each member, as `group_by_keys` takes them; of those that nobody needs, no bytes.

    WebDataset's own reader unpacks compressed files, and writes sparse ones out: a few bytes then fill the memory.
    """
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would remember them all
            if not member.isreg() or member.issparse() or member.name.startswith("__"):
                continue
            suffix = member.name.rpartition("/")[2].partition(".")[2].lower()
            file = tar.extractfile(member) if suffix in (*_IMAGES, _LABEL) else None
            yield {"fname": member.name, "data": b"" if file is None else file.read(), "__url__": shard}


def _raise(error: Exception) -> bool:
    error.args = error.args[:1]  # behind the message WebDataset has put its stream
    raise error


def _sample(members: dict[str, Any], name: str, num_classes: int, unlabelled: int) -> Sample:
    where = f"the sample {shown(name)}"
    found = [suffix for suffix in _IMAGES if suffix in members]
    if len(found) != 1:
        raise ImageError(f"{where} has {len(found)} images; expected one of {', '.join(_IMAGES)} beside its .{_LABEL}")
    if _LABEL not in members:
        raise ImageError(f"{where} has no class; expected a number in a member .{_LABEL} right before or behind it")
    text: bytes = members[_LABEL]
    try:
        label = int(text)
    except ValueError as error:
        raise ImageError(f"{where} has the class {shown(text)}; expected a number") from error
    if label != unlabelled and not 0 <= label < num_classes:
        raise ImageError(
            f"{where} has the class {label}, outside the {num_classes} classes, 0 to {num_classes - 1}; correct it or "
            f"num_classes, or mark images without a label by {unlabelled}"
        )
    return Sample(name, members[found[0]], label)
