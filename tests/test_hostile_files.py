"""Malicious files: regression tests for findings of `python -m tests.fuzz` and of reviews."""

from __future__ import annotations

import importlib
import io
import itertools
import os
import re
import shutil
import signal
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from lkd.__main__ import main
from lkd.checkpoints.find import read_checkpoint
from lkd.checkpoints.io import AtomicCheckpointIO
from lkd.datamodules import CIFAR10DataModule, ImageFolderDataModule, WebDatasetDataModule
from lkd.datamodules.dataset import ImageError
from lkd.io import safe_load
from lkd.io.refused import shown
from lkd.io.tensor_cache import load_tensors, made_from
from lkd.models import CIFARResNet, load_weights
from tests.fuzz import canary, pickles

if sys.platform == "linux":
    from tests.fuzz.runner import READERS, fuzz


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Fail tests that hang."""

    def fail(*_: object) -> None:
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def network() -> CIFARResNet:
    torch.manual_seed(0)
    return CIFARResNet(8, (2, 2, 2, 2), 3)


def error_of(content: bytes | object, name: str = "w.pth") -> str:
    """Return the error message of `load_weights` for a file, and check that the network is unchanged."""
    Path(name).write_bytes(content) if isinstance(content, bytes) else torch.save(content, name)
    own = network()
    with pytest.raises(ValueError, match=r"w\.") as caught:
        load_weights(own, name)
    assert "\n" not in str(caught.value)
    for ours, before in zip(own.state_dict().values(), network().state_dict().values(), strict=True):
        assert torch.equal(ours, before)
    return str(caught.value)


def changed_state(change: Callable[[Tensor], object], name: str = "fc.weight") -> dict[str, object]:
    state = network().state_dict()
    return {**state, name: change(state[name])}


@pytest.mark.parametrize(
    ("change", "expected_message"),
    [
        (lambda own: own * float("nan"), "fc.weight has 6 of 6 values that are NaN or infinite"),
        (lambda own: own.index_fill(1, torch.tensor([0]), float("inf")), "fc.weight has 3 of 6 values that are NaN"),
        (lambda own: own.double() + 1e300, "fc.weight has 6 of 6 values that are NaN or infinite"),  # in float32
        (lambda own: own.to(torch.int8), "fc.weight has dtype torch.int8, expected weights"),
        (lambda own: own > 0, "fc.weight has dtype torch.bool"),
        (lambda own: own.to(torch.complex64), "fc.weight is a Tensor of type torch.complex64"),
        (lambda own: own.to("meta"), "fc.weight is without data"),
        (lambda own: own.to_sparse(), "fc.weight is a Tensor of type torch.float32, torch.sparse_coo"),
        (lambda own: torch.zeros(1).expand(10**12), r"fc.weight has 1,000,000,000,000 numbers, but the file"),
    ],
)
def test_invalid_tensors(change: Callable[[Tensor], object], expected_message: str) -> None:
    assert expected_message in error_of(changed_state(change))


def test_total_size_of_tensors() -> None:
    state = network().state_dict()
    torch.save(state, "w.pth")
    size = Path("w.pth").stat().st_size
    assert "numbers, but the file" in error_of(state | {f"x{i}": torch.zeros(1).expand(2 * size) for i in range(5)})


def test_infinite_buffers_of_the_network_are_allowed() -> None:
    own = network()
    own.register_buffer("mask", torch.full((2,), -float("inf")))
    torch.save(own.state_dict(), "w.pth")
    load_weights(own, "w.pth")
    own.mask = torch.zeros(2)
    with pytest.raises(ValueError, match="mask has 2 of 2 values that are NaN or infinite"):
        load_weights(own, "w.pth")


@pytest.mark.parametrize("name", ["x" * 10**6, "a\nb", "\x1b[2J", "\u202e"])
def test_names_in_messages_are_short_and_escaped(name: str) -> None:
    message = error_of(network().state_dict() | {name: torch.zeros(1)})
    assert message.isprintable()
    assert len(message) < 700
    assert shown(name).isprintable()


def test_name_of_prefixes_is_processed_quickly() -> None:
    assert "unexpected" in error_of(network().state_dict() | {"net." * 100_000: torch.zeros(1)})


def nested_pairs(levels: int, end: bytes) -> bytes:
    """Return a pickle of nested pairs: hashing or printing the last one takes 2^levels steps."""
    return b"\x80\x02}(K\x00" + b"q\x00h\x00\x86" * levels + end


@pytest.mark.parametrize(
    ("pickled", "expected_message"),
    [
        (nested_pairs(100, b"K\x01u."), "reference each other too often"),  # the key of a dictionary
        (nested_pairs(5000, b"K\x01u."), "reference each other too often"),
        (b"\x80\x02}N" + b"\x85" * 200_000 + b"K\x01s.", "reference each other too often"),  # hashing it crashes
        (b"\x80\x02]" + b"q\x00](h\x00h\x00e" * 60 + b")R.", "reference each other too often"),  # printed by the error
        (b"\x80\x02]q\x00h\x00a.", "an object in it contains itself"),
        (b"\x80\x02]q\x00}q\x01(X\x01\x00\x00\x00ah\x00uh\x00h\x01a.", "an object in it contains itself"),
        (b"\x80\x02cnumpy\ndtype\n(X\x0b\x00\x00\x00V2000000000tR.", "it contains the NumPy type V2000000000"),
        (pickles.call("tests.fuzz.canary ring"), "requires code to be executed (tests.fuzz.canary.ring)"),
    ],
)
@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_pickles_with_unlimited_hashing_or_printing(pickled: bytes, expected_message: str, layout: str) -> None:
    head = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."
    canary.heard.clear()
    assert expected_message in error_of(pickles.zipped(pickled, ()) if layout == "zip" else head + pickled)
    assert not canary.heard


def test_legacy_header_equals_pytorch() -> None:
    """The layout `legacy` of the previous test starts like PyTorch's files."""
    torch.save({}, "empty.pth", _use_new_zipfile_serialization=False)
    assert (
        Path("empty.pth")
        .read_bytes()
        .startswith(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}")
    )


def test_shared_objects_are_read() -> None:
    shared = [tuple(range(100))] * 50
    torch.save(
        {"model": network().state_dict(), "history": [shared] * 20, "rng": (3, tuple(range(625)), None)}, "w.pth"
    )
    load_weights(network(), "w.pth")


def rezipped(
    compression: int = zipfile.ZIP_STORED, prefix: bytes = b"", comment: bytes = b"", twice: bool = False
) -> bytes:
    torch.save(network().state_dict(), "good.pth")
    with zipfile.ZipFile("good.pth") as source, zipfile.ZipFile("bad.pth", "w", compression) as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
        if twice:
            target.writestr(source.namelist()[0].upper(), b"")
        target.comment = comment
    return prefix + Path("bad.pth").read_bytes()


def test_unusual_zip_archives() -> None:
    Path("w.pth").write_bytes(rezipped())
    load_weights(network(), "w.pth")
    assert "its content is compressed" in error_of(rezipped(zipfile.ZIP_DEFLATED))
    for made in (rezipped(comment=b"x"), rezipped(twice=True), rezipped(prefix=b"PK\x03\x04" + b"\0" * 30)):
        assert "a zip archive that was not written by torch.save" in error_of(made)


def test_zip_bomb_is_not_unpacked() -> None:
    bomb = pickles.zipped(b"\0" * 2**27, (), zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**18
    assert "its content is compressed" in error_of(bomb)


@pytest.mark.parametrize("size", [2**62, 2**32, 0])
def test_invalid_safetensors_headers(size: int) -> None:
    header = b'{"fc.weight":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    assert "or it is corrupt" in error_of(struct.pack("<Q", size or len(header)) + header + b"\0" * 8, "w.safetensors")


def checkpoint(**changes: object) -> Path:
    content = {"state_dict": network().state_dict(), "pytorch-lightning_version": "2.6.6", "optimizer_states": []}
    torch.save(content | changes, "last.ckpt")
    return Path("last.ckpt")


def test_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    read_checkpoint(checkpoint(), whole=True)
    read_checkpoint(checkpoint(state_dict=changed_state(lambda own: own - float("inf"))))  # as some criteria start
    with pytest.raises(ValueError, match=r"was not loaded: fc\.weight contains NaN"):
        read_checkpoint(checkpoint(state_dict=changed_state(lambda own: own * float("nan"))))
    with pytest.raises(ValueError, match="1,000,000,000,000 numbers, but the file"):
        read_checkpoint(checkpoint(state_dict={"x": torch.zeros(1).expand(10**12)}))
    Path("last.ckpt").write_bytes(pickles.zipped(nested_pairs(100, b"K\x01u."), ()))
    assert main(["fit", "--config", "digits/kd", "--ckpt_path", "last.ckpt"]) == 2
    assert "last.ckpt was not loaded: its objects reference each other" in capsys.readouterr().err


LAUGHS = "l0: &l0 [x]\n" + "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 30))
MERGED = "l0: &l0 {k: 1}\n" + "".join(f"l{i}: &l{i} {{<<: [{', '.join([f'*l{i - 1}'] * 10)}]}}\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "expected_message"),
    [
        (LAUGHS, "reference each other too often"),
        (MERGED, "reference each other too often"),
        ("data: &a {x: *a}", "contains itself"),
        ("data: &a [*a]", "contains itself"),
        ("data: " + "[" * 100_000, "nest"),
        ("data: " + "[" * 200 + "]" * 200, "nest"),
        ("# " + "x" * 2**21, "the text has 2,097,154 characters; a config may have at most"),
        ("trainer: {max_epochs: 1}\ntrainer: {max_epochs: 2}", "duplicate key trainer in line 2"),
        ("seed_everything: " + "9" * 5000, "a value in it cannot be read"),
        ("seed_everything: 2001-99-99", "a value in it cannot be read"),
        ("seed_everything: !!timestamp x", "a value in it cannot be read"),
        ("trainer: !!python/object/apply:tests.fuzz.canary.ring []", "could not determine a constructor"),
        ("config: {a: 1}", "has a key 'config'; pass each file on the command line with its own"),
        ("trainer:\n\tmax_epochs: 1", "cannot start any token"),
        (
            "model: bomb.yaml\ndata: lkd.DigitsDataModule",
            "model: Invalid content in sub-config file bomb.yaml: its objects reference each other",
        ),
        (
            "data: lkd.DigitsDataModule\nmodel: {class_path: os.system}",
            "Import path os.system does not correspond to a subclass of LightningModule",
        ),
        (
            "data: lkd.DigitsDataModule\nmodel: {class_path: lkd.ClassificationModule, init_args: "
            "{model: {class_path: tests.fuzz.canary.ring}}}",
            "ring",
        ),
    ],
)
def test_configs(text: str, expected_message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("it.yaml").write_text(text)
    Path("bomb.yaml").write_text(LAUGHS)
    canary.heard.clear()
    assert main(["fit", "--config", "it.yaml"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "lkd: error: " in line]
    assert expected_message in line
    assert not canary.heard


def test_common_yaml_aliases() -> None:
    from lkd.io.yaml import load_yaml

    text = "a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, y: 3}\nc: [*a, *a]"
    assert load_yaml(text)["b"] == {"x": 1, "y": 3}


def test_malicious_header_of_a_cached_file() -> None:
    header = b'{"__metadata__":{"lkd":"' + b"[" * 100_000 + b'"},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    Path("kept.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.warns(UserWarning, match="is ignored and will be recreated: it cannot be read"):
        assert load_tensors(Path("kept.safetensors"), {}) is None


def tree(*names: str, count: int = 3) -> Path:
    """Create folders of valid images, and return the folder to which invalid ones are added."""
    for folder in names or ("train/cat", "train/dog", "test/cat", "test/dog"):
        (Path("pets") / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.effect_noise((9, 8), 99).convert("RGB").save(Path("pets") / folder / f"{number}.png")
    return Path("pets/test/cat")


def pets(**settings: object) -> ImageFolderDataModule:
    return ImageFolderDataModule("pets", 8, num_workers=0, val_size=0, **settings)


def shown_images(data: ImageFolderDataModule) -> list[int]:
    data.setup("test")
    return [index for batch in data.test_dataloader() for index in batch.index.tolist()]


def damage(kind: str, path: Path) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge":
        path.write_bytes(b"P6 2000000000 2000000000 255\n")
    elif kind == "line":
        Image.new("1", (10**6, 1)).save(path, "PNG")
    elif kind == "eps":  # Pillow would run Ghostscript for this file
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    elif kind == "cut":
        path.write_bytes((path.parent / "0.png").read_bytes()[:60])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.symlink_to(kind)


DAMAGES = ["fifo", "huge", "line", "eps", "cut", "empty", "/dev/zero", "/proc/kmsg", "nowhere", "1.jpg"]


@pytest.mark.parametrize("limit", [0, 2**30])
@pytest.mark.parametrize("kind", DAMAGES)
def test_unreadable_image(kind: str, limit: int) -> None:
    damage(kind, tree() / "1.jpg")
    with pytest.raises(ImageError, match=r"image pets/test/cat/1.jpg cannot be read \(.*\); replace or remove it"):
        shown_images(pets(resident_limit=limit))
    for _ in range(2):  # detected in the first pass, and read from the cache in the second
        data = pets(resident_limit=limit, unreadable="skip")
        with pytest.warns(
            UserWarning, match=r"1 of 7 images in pets/test cannot .*: pets/test/cat/1.jpg \(.*the full list is in"
        ):
            assert shown_images(data) == [0, 2, 3, 4, 5, 6]  # the other images keep their index


def test_unreadable_images_are_excluded_from_training() -> None:
    tree(count=6)
    for number in (1, 4):
        Path(f"pets/train/cat/{number}.png").write_bytes(b"no image")
    for settings in (
        {"resident_limit": 0},
        {"augment": []},
        {"val_size": 4},
        {"label_size": 4, "drop_unlabelled": True},
    ):
        data = ImageFolderDataModule("pets", 8, num_workers=0, unreadable="skip", **{"val_size": 0, **settings})
        with pytest.warns(UserWarning, match="2 of 12 images"):
            data.setup("fit")
        splits = [split.index.tolist() for split in data.datasets.values()]
        assert not {1, 4} & {position for split in splits for position in split}
        expected = 4 if "drop_unlabelled" in settings else 10
        assert sum(map(len, splits)) == expected
        assert data.num_samples == 12
        for batch in data.train_dataloader():
            assert batch.input.isfinite().all()


def test_replaced_images_are_checked_again() -> None:
    bad = tree() / "1.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:50])
    with pytest.warns(UserWarning, match="1 of 6 images"):
        assert len(shown_images(pets(unreadable="skip"))) == 5
    bad.write_bytes(good)
    assert len(shown_images(pets(unreadable="skip"))) == 6


def test_readability_depends_on_the_image_size() -> None:
    Image.new("RGB", (200, 1)).save(tree() / "3.png")
    assert len(shown_images(pets(unreadable="skip"))) == 7
    with pytest.warns(UserWarning, match="1 of 7 images .* is too narrow"):
        assert len(shown_images(pets(unreadable="skip", crop_ratio=0.01))) == 6


def test_class_without_a_readable_image() -> None:
    folder = tree(count=1)
    (folder / "0.png").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="are skipped"),
        pytest.raises(ValueError, match="no test image of these classes in pets/test can be read: cat;"),
    ):
        shown_images(pets(unreadable="skip"))


def test_invalid_lists_of_unreadable_images() -> None:
    damage("cut", tree() / "1.jpg")
    with pytest.warns(UserWarning, match="1 of 7"):
        shown_images(pets(unreadable="skip"))
    (file,) = Path("lkd_cache/unreadable").iterdir()
    for forged in ('{"images": [{"position": 99, "reason": ""}]}', "[" * 10**5, "{}", "3", file.read_text()[:20]):
        file.write_text(forged)
        with pytest.warns(UserWarning, match="1 of 7"):
            assert 1 not in shown_images(pets(unreadable="skip"))


def test_links_are_followed_except_for_loops() -> None:
    folder = tree()
    Path("elsewhere/deep").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("elsewhere/deep/7.png")
    (folder / "more").symlink_to(Path("elsewhere").resolve())
    (Path("elsewhere") / "back").symlink_to(folder.resolve())
    for name in "abcdefghij":
        (folder / name).symlink_to(".")
    (folder / "3.png").symlink_to("0.png")
    assert len(shown_images(pets())) == 3 + 3 + 1 + 1


def test_broken_links() -> None:
    tree()
    Path("pets/test/bird").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match=r"broken symbolic links in pets/test: bird; fix or remove them"):
        shown_images(pets())


@pytest.mark.parametrize("name", [b"a\nb.png", b"\xff\xfe.png", b"-a.png", b"\x1b[2J.png", b"%s {}.png"])
def test_unusual_names(name: bytes) -> None:
    folder = tree()
    path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
    path.write_bytes((folder / "0.png").read_bytes())
    (folder / "folder.png").mkdir()
    assert len(shown_images(pets())) == 7
    path.write_bytes(b"")
    with pytest.raises(ImageError) as caught:
        shown_images(pets())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("mode", ["CMYK", "P", "RGBA", "LA", "1", "I;16", "L"])
def test_modes(mode: str) -> None:
    folder = tree()
    Image.new("L", (9, 8), 200).convert("L" if mode in ("LA", "I;16") else "RGB").convert(mode).save(folder / "3.tif")
    assert len(shown_images(pets())) == 7


def test_first_image_of_a_file_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    frames[0].save(tree() / "0.jpg", "GIF", save_all=True, append_images=frames[1:])
    data = pets(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    data.setup("test")
    assert next(iter(data.test_dataloader())).input[0].mean() == 1


if sys.platform == "linux":

    def test_short_fuzz_run() -> None:
        signal.alarm(0)  # it has its own limits
        results = dict(fuzz(list(READERS), range(40), seed=0))
        assert {name: result.findings for name, result in results.items()} == {name: [] for name in READERS}
        for result in results.values():
            assert result.kinds.total() == 40
            assert 0 < result.kinds["accepted"] < 40

    def test_fuzz_detects_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from tests.fuzz import runner

        own = type("Own", (), {"read": staticmethod(lambda path: canary.ring() or "accepted")})
        module = type("Module", (), {"REFUSALS": (ValueError,), "MEMORY": 2**20, "__name__": "x"})
        assert runner._read(own, module, tmp_path)[1] == "something was run: canary"
        own.read = staticmethod(lambda path: "accepted")
        with monkeypatch.context() as patch:  # the peak memory of this process includes all previous tests
            sizes = itertools.count(0, 2**26)
            patch.setattr(runner, "_status", lambda name: next(sizes))
            assert runner._read(own, module, tmp_path)[1] == "64 MiB of memory"
        own.read = staticmethod(lambda path: 1 / 0)
        assert runner._read(own, module, tmp_path)[1] == "ZeroDivisionError: division by zero"


@pytest.fixture
def attack_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide the files that attacks read, and let torch store its own files in the working directory."""
    pickles.bystanders(tmp_path)
    monkeypatch.setenv("TORCH_HOME", ".")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", pickles.HARM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "payload", raising=False)


LAYOUTS = {"zip": pickles.zipped, "legacy": pickles.legacy}
CODE = "nsupported (GLOBAL|global)"  # PyTorch's message for a file that requires code
READS: dict[str, tuple[Callable[[str], object], str]] = {
    "read_torch": (lambda name: safe_load.read_torch(Path(name)), CODE),
    "load_weights": (lambda name: load_weights(network(), name), r"requires code to be executed \("),
    "read_checkpoint": (lambda name: read_checkpoint(Path(name)), r"without executing code \(UnpicklingError\)"),
    "load_checkpoint": (lambda name: AtomicCheckpointIO().load_checkpoint(name), f"{CODE}|Weights only load failed"),
}


def check_attack(attack: str, layout: str, reader: str) -> None:
    """Check that a reader rejects a file because of its code, and does not run it."""
    read, expected_message = READS[reader]
    Path("w.pth").write_bytes(LAYOUTS[layout](pickles.whole(pickles.ATTACKS[attack])))
    try:
        read("w.pth")
    except Exception as error:
        message = str(error)
    else:
        message = "it was read"
    assert re.search(expected_message, message), message
    assert not list(Path().glob(f"{pickles.HARM}*")), "the code was run"


@pytest.mark.usefixtures("attack_files")
@pytest.mark.parametrize("attack", pickles.ATTACKS)
def test_no_code_is_run(attack: str) -> None:
    for layout, reader in itertools.product(LAYOUTS, READS):
        check_attack(attack, layout, reader)


def remove_traces() -> None:
    """Remove the traces of attacks."""
    sys.modules.pop("payload", None)
    for left in Path().glob(f"{pickles.HARM}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


# These attacks leave no file. If they are rejected for another reason, or not at all, their function was called.
SILENT = {"functools partial", "functools reduce", "operator attrgetter", "numpy fromfile", "PIL.ImageMath unsafe_eval"}
SILENT |= {f"builtins {name}" for name in ("map", "compile", "setattr")} | {"ctypes CDLL"}
SILENT |= {"torch load", "torch.serialization load", "torch.serialization add_safe_globals", "torch.jit load"}
SILENT |= {"torch.ops load_library", "torch set_default_dtype", "torch manual_seed"}
SILENT |= {name for name in pickles.ATTACKS if name.startswith("lkd")}


@pytest.mark.usefixtures("attack_files")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", pickles.ATTACKS)
def test_attacks_succeed_if_their_functions_are_allowed(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, the previous test would pass for any unpickler."""
    from torch import _weights_only_unpickler as unpickler

    pairs = []
    for name in attack.split(", "):
        module, function = name.split()
        found = reduce(getattr, function.split("."), importlib.import_module(module))
        pairs.append((found, f"{module}.{function}"))
    monkeypatch.setattr(safe_load, "_HARMLESS", [*safe_load._HARMLESS, *pairs])
    monkeypatch.setattr(unpickler, "_blocklisted_modules", [])  # torch never allows functions of os, posix and sys
    monkeypatch.setattr(unpickler, "_marked_safe_globals_set", set())
    dtype, random = torch.get_default_dtype(), torch.random.get_rng_state()
    try:
        for layout, reader in itertools.product(LAYOUTS, READS):
            if attack in SILENT and reader == "load_checkpoint":
                continue  # Lightning reads the file again there and allows no functions
            with pytest.raises(AssertionError):
                check_attack(attack, layout, reader)
            if attack not in SILENT:
                assert list(Path().glob(f"{pickles.HARM}*")), "the attack came to nothing"
            remove_traces()
    finally:
        torch.set_default_dtype(dtype)
        torch.random.set_rng_state(random)


@pytest.mark.usefixtures("attack_files")
def test_no_other_reader_unpickles(capsys: pytest.CaptureFixture[str]) -> None:
    from lkd.datamodules.unreadable import _kept

    attack = pickles.whole(pickles.ATTACKS["builtins eval"])
    contents = {"zip": pickles.zipped(attack), "legacy": pickles.legacy(attack), "bare": attack}
    for content in contents.values():
        file = Path("kept.safetensors")
        file.write_bytes(content)
        with pytest.warns(UserWarning, match="is ignored and will be recreated"):
            assert load_tensors(file, {}) is None
        assert made_from(file) is None
        with pytest.raises(ValueError, match="is not a safetensors file"):
            load_weights(network(), file)
        assert _kept(file, 3) is None
        file.rename("it.ckpt")
        assert main(["test", "--config", "digits/kd", "--ckpt_path", "it.ckpt"]) == 2
        assert "PyTorch can read without executing code" in capsys.readouterr().err

    batches = Path("data/cifar-10-batches-py")
    batches.mkdir(parents=True)
    for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (batches / name).write_bytes(attack)
    with pytest.raises(FileNotFoundError):
        CIFAR10DataModule("data").setup("test")

    with tarfile.open("0.tar", "w") as shard:
        image = io.BytesIO()
        Image.new("RGB", (8, 8)).save(image, "PNG")
        for ending, content in {"png": image.getvalue(), "cls": b"0", **dict.fromkeys(("pkl", "pth"), attack)}.items():
            member = tarfile.TarInfo(f"a.{ending}")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    data = WebDatasetDataModule("0.tar", 2, 1, test="0.tar", image_size=8, num_workers=0)
    data.setup("test")
    assert sum(len(batch.target) for batch in data.test_dataloader()) == 1
    assert not Path(pickles.HARM).exists()
