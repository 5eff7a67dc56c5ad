"""Unusual and malicious pickles, in the three layouts that PyTorch reads."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

HARM = "harm"
"""The file that an attack leaves behind if it succeeds."""

_CODE = f"open({HARM!r}, 'w').close()"
_NONE, _TRUE, _FALSE, _DICT = b"N", b"\x88", b"\x89", b"}"


class _Code:
    """An object whose pickle calls `eval` when it is read without torch's checks."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, (_CODE,)


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _number(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _bytes(content: bytes) -> bytes:
    return _made("_codecs encode", _text(content.decode("latin1")), _text("latin1"))


def _list(*parts: bytes) -> bytes:
    return b"](" + b"".join(parts) + b"e"


def _global(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _made(name: str, *args: bytes) -> bytes:
    """Return the instructions that put the result of a call on the stack; arguments are given as instructions."""
    return _global(name) + b"(" + b"".join(args) + b"tR"


def _run(function: bytes, *args: bytes, returns: bytes = b"N") -> bytes:
    """Call a function on the stack that torch need not allow, by means of a function that torch allows."""
    return _made("torch._tensor _rebuild_from_type_v2", function, returns, b"(" + b"".join(args) + b"t", _NONE)


def _keys(function: bytes) -> bytes:
    """Call a function on the stack without arguments, by means of OrderedDict, which calls an object's `keys`."""
    namespace = _made("argparse Namespace") + b"}" + _text("keys") + function + b"sb"
    return _made("collections OrderedDict", namespace)


def _saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


_FLOAT = _made("numpy dtype", _text("f8"), _FALSE, _TRUE)
_SCALAR = _made("numpy.core.multiarray scalar", _FLOAT, _bytes(bytes(8)))  # it has methods that write files
_PICKLE = _bytes(pickle.dumps(_Code(), 2))
_GETATTR = "builtins getattr"
_GET = _made(_GETATTR, _made(_GETATTR, _global("torch._utils _rebuild_tensor"), _text("__builtins__")), _text("get"))
_EVAL = _run(_GET, _text("eval"), returns=_made(_GETATTR, _GET, _text("__class__")))

ATTACKS = {
    "builtins eval": _made("builtins eval", _text(_CODE)),
    "builtins exec": _made("builtins exec", _text(_CODE)),
    "builtins open": _made("builtins open", _text(HARM), _text("w")),
    "builtins __import__": _made("builtins __import__", _text("payload")),
    "builtins compile": _made("builtins compile", _text(_CODE), _text(""), _text("exec")),
    "builtins setattr": _made("builtins setattr", _made("argparse Namespace"), _text("x"), _NONE),
    _GETATTR: _run(_EVAL, _text(_CODE)),
    "functools reduce, builtins getattr": _run(
        _made("functools reduce", _global(_GETATTR), _list(_SCALAR, _text("tofile"))), _text(HARM)
    ),
    "functools reduce": _made("functools reduce", _global("builtins complex"), _list(_number(1), _number(2))),
    "functools partial, builtins eval": _keys(_made("functools partial", _global("builtins eval"), _text(_CODE))),
    "functools partial": _keys(_made("functools partial", _global("builtins bytearray"), _number(1))),
    "builtins map, builtins eval": _made(
        "builtins set", _made("builtins map", _global("builtins eval"), _list(_text(_CODE)))
    ),
    "builtins map": _made("builtins map", _global("builtins bytearray"), _list(_number(1))),
    "operator attrgetter": _made("operator attrgetter", _text("__builtins__.get")),
    "operator methodcaller": _run(_made("operator methodcaller", _text("tofile"), _text(HARM)), _SCALAR),
    "os system": _made("os system", _text(f"touch {HARM}")),
    "posix system": _made("posix system", _text(f"touch {HARM}")),
    "subprocess getoutput": _made("subprocess getoutput", _text(f"touch {HARM}")),
    "subprocess check_call": _made("subprocess check_call", _list(_text("touch"), _text(HARM))),
    "subprocess run": _made("subprocess run", _list(_text("touch"), _text(HARM))),
    "importlib import_module": _made("importlib import_module", _text("payload")),
    "runpy run_path": _made("runpy run_path", _text("payload.py")),
    "pickle loads": _made("pickle loads", _PICKLE),
    "pickle _loads": _made("pickle _loads", _PICKLE),
    "timeit timeit": _made("timeit timeit", _text("pass"), _text(_CODE)),
    "cProfile run": _made("cProfile run", _text(_CODE)),
    "shutil copyfile": _made("shutil copyfile", _text("payload.py"), _text(HARM)),
    "io FileIO": _made("io FileIO", _text(HARM), _text("w")),
    "logging FileHandler": _made("logging FileHandler", _text(HARM)),
    "sqlite3 connect": _made("sqlite3 connect", _text(HARM)),
    "ctypes CDLL": _made("ctypes CDLL", _text("payload.so")),
    "torch load": _made("torch load", _text("payload.pth")),
    "torch.serialization load": _made("torch.serialization load", _text("payload.pth")),
    "torch.jit load": _made("torch.jit load", _text("payload.pth")),
    "torch.storage _load_from_bytes": _made("torch.storage _load_from_bytes", _bytes(_saved(_Code()))),
    "torch save": _made("torch save", _DICT, _text(HARM)),
    "torch from_file": _made("torch from_file", _text(HARM), _TRUE, _number(4)),
    "torch UntypedStorage.from_file": _made("torch UntypedStorage.from_file", _text(HARM), _TRUE, _number(4)),
    "torch.hub load": _made("torch.hub load", _text("pytorch/vision:main"), _text("x")),
    "torch.hub download_url_to_file": _made("torch.hub download_url_to_file", _text("file:payload.py"), _text(HARM)),
    "torch.hub load_state_dict_from_url": _made(
        "torch.hub load_state_dict_from_url", _text("file:payload.pth"), _text(HARM)
    ),
    "torch.serialization add_safe_globals": _made(
        "torch.serialization add_safe_globals", _list(b"(" + _global("_codecs encode") + _text("builtins.eval") + b"t")
    ),
    "torch.utils.cpp_extension load": _made("torch.utils.cpp_extension load", _text("x"), _list(_text("payload.py"))),
    "torch.utils.collect_env run": _made("torch.utils.collect_env run", _text(f"touch {HARM}")),
    "torch.jit.unsupported_tensor_ops execWrapper": _made(
        "torch.jit.unsupported_tensor_ops execWrapper", _text(_CODE), _DICT, _DICT
    ),
    "torch.fx.graph_module _exec_with_source": _made("torch.fx.graph_module _exec_with_source", _text(_CODE), _DICT),
    "torch.utils.data.datapipes.utils.decoder basichandlers": _made(
        "torch.utils.data.datapipes.utils.decoder basichandlers", _text("pickle"), _PICKLE
    ),
    "torch.ops load_library": _made("torch.ops load_library", _text("payload.so")),
    "torch set_default_dtype": _made("torch set_default_dtype", _global("torch float64")),
    "torch manual_seed": _made("torch manual_seed", _number(3)),
    "numpy load": _made("numpy load", _text("payload.pkl"), _NONE, _TRUE),
    "numpy save": _made("numpy save", _text(f"{HARM}.npy"), _number(1)),
    "numpy savetxt": _made("numpy savetxt", _text(HARM), _list(_number(1))),
    "numpy fromfile": _made("numpy fromfile", _text("payload.pkl"), _FLOAT),
    "numpy memmap": _made("numpy memmap", _text(HARM), _FLOAT, _text("w+"), _number(0), _number(4)),
    "numpy.testing._private.utils runstring": _made("numpy.testing._private.utils runstring", _text(_CODE), _DICT),
    "numpy.f2py.crackfortran param_eval": _made("numpy.f2py.crackfortran param_eval", _text(_CODE), _DICT, _DICT),
    "PIL.ImageMath unsafe_eval": _made("PIL.ImageMath unsafe_eval", _text("1")),
    "lkd.__main__ main": _made("lkd.__main__ main", _list(_text("--version"))),
    "lkd.io.yaml load_yaml": _made("lkd.io.yaml load_yaml", _text("x"), _global("builtins bytearray")),
    "lkd.io.tensor_cache save_tensors": _made("lkd.io.tensor_cache save_tensors", _text(HARM), _DICT, _DICT),
    "lkd.io.safe_load read_torch": _made("lkd.io.safe_load read_torch", _text("payload.pth")),
}
"""Instructions of each attack, by the functions that it requires: `module name`, separated by commas.

Each succeeds if exactly these functions are allowed. Most then leave the file `HARM`. `bystanders` writes
the files that some of them read.
"""


def bystanders(folder: Path) -> None:
    """Write the files that attacks read, as if they came with the same download."""
    hub = folder / "hub/pytorch_vision_main"  # below $TORCH_HOME
    hub.mkdir(parents=True, exist_ok=True)
    for script in (folder / "payload.py", hub / "hubconf.py"):
        script.write_text(_CODE)
    (folder / "payload.pkl").write_bytes(pickle.dumps(_Code()))
    torch.save({}, folder / "payload.pth")


_HARMFUL = sorted({name for names in ATTACKS for name in names.split(", ")})
_GLOBALS = [
    *_HARMFUL,
    *("tests.fuzz.canary ring", "os _wrap_close"),
    *("builtins bytearray", "builtins set", "builtins complex", "_codecs encode", "collections Counter"),
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor", "torch Size"),
    *("torch._utils _rebuild_parameter", "torch._utils _rebuild_meta_tensor_no_storage", "torch Tensor"),
    *("torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor", "torch._utils _rebuild_nested_tensor"),
    *("torch._utils _rebuild_wrapper_subclass", "torch._tensor _rebuild_from_type_v2", "torch.nn.parameter Parameter"),
    *("torch FloatStorage", "torch ByteStorage", "torch.storage UntypedStorage", "torch float32", "torch device"),
    *("torch.serialization _get_layout", "numpy dtype", "numpy.core.multiarray scalar", "argparse Namespace"),
]
_NUMBERS = [0, 1, 2, 4, -1, 255, 1000, 10**6, 2**31 - 1]
_TEXTS = ["", "storage", "0", "1", "cpu", "cuda", "state_dict", "fc.weight", "f8", "O", "V2000000000", "zlib", "idna"]


def program(rng: random.Random) -> bytes:
    """Return a stream of instructions, most of which find their operands on the stack."""
    out, depth, stored, marks = bytearray(b"\x80\x02"), 0, 0, []
    for _ in range(rng.randint(3, 60)):
        kind = rng.random()
        if kind < 0.3 or depth < 2:
            out += _push(rng)
            depth += 1
        elif kind < 0.45:
            name = rng.choice(_GLOBALS).split()
            out += b"c" + "\n".join(name).encode() + b"\n"
            depth += 1
        elif kind < 0.55:
            out += b"q" + bytes([stored % 256])
            stored += 1
        elif kind < 0.7 and stored:
            out += b"h" + bytes([rng.randrange(min(stored, 256))])
            depth += 1
        elif kind < 0.75:
            marks.append(depth)
            out += b"("
        elif kind < 0.8 and marks:
            depth = marks.pop() + 1
            out += b"t"
        else:
            code, change = rng.choice(
                [(b"R", -1), (b"b", -1), (b"\x81", -1), (b"a", -1), (b"\x86", -1), (b"\x85", 0), (b"Q", 0)]
            )
            out += code
            depth += change
    return bytes(out + b".")


def _push(rng: random.Random) -> bytes:
    text = rng.choice(_TEXTS).encode()
    return rng.choice(
        [
            b"J" + struct.pack("<i", rng.choice(_NUMBERS)),
            b"X" + struct.pack("<I", len(text)) + text,
            rng.choice([b"N", b"}", b"]", b")", b"\x88", b"\x89", b"\x8f"]),
            b"\x8a\x08" + struct.pack("<q", rng.choice([2**33, 2**40, 2**62])),
            b"G" + struct.pack(">d", rng.choice([float("nan"), 1e308, 0.0])),
        ]
    )


def call(name: str, *args: bytes) -> bytes:
    """Return a complete pickle of one call; each argument is given by its instructions."""
    return whole(_made(name, *args))


def whole(instructions: bytes) -> bytes:
    """Return a pickle that consists of the given instructions."""
    return b"\x80\x02" + instructions + b"."


def attack(rng: random.Random) -> bytes:
    """Return a pickle that would do harm if it were executed."""
    levels = rng.choice([30, 100, 3000])
    number = b"\x8a\x08" + struct.pack("<q", rng.choice([2**33, 2**40, 2**50]))
    doubled = b"\x80\x02}(K\x00" + b"".join(b"q\x00h\x00\x86" for _ in range(levels))
    return rng.choice(
        [
            whole(ATTACKS[rng.choice(list(ATTACKS))]),
            call(rng.choice([*_HARMFUL, "tests.fuzz.canary ring"]), _text("touch")),
            call("builtins bytearray", number),
            call("torch Tensor", number),
            call("torch.storage UntypedStorage", number),
            call(
                "_codecs encode",
                b"X" + struct.pack("<I", 40_000) + b"\xc3\xa4" * 20_000,
                b"X\x08\x00\x00\x00punycode",
            ),
            doubled + b"K\x01u.",  # a key, which is hashed
            doubled + b"K\x01sR.",
            b"\x80\x02]q\x00" + b"h\x00h\x00a" * levels + b".",  # contains itself
            b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
            b"\x80\x02N" + b"\x85" * rng.choice([50, 500, 30_000]) + b".",
            b"\x80\x02}N" + b"\x85" * 30_000 + b"K\x01s.",
            b"\x80\x02}(K\x00" + b"q\x00](h\x00h\x00e" * levels + b"u.",
            b"\x80\x02" + b"q\x00](h\x00h\x00e".join([b"]"] + [b""] * levels) + b")R.",  # printed in the error message
            b"\x80\x02cnumpy\ndtype\n(X\x0b\x00\x00\x00V2000000000tR.",
        ]
    )


def wrapped(rng: random.Random, pickled: bytes, storages: Sequence[bytes] = (b"\0" * 64,)) -> bytes:
    """Return a pickle in one of PyTorch's layouts: a zip archive, the legacy format, or a bare pickle."""
    way = rng.random()
    if way < 0.1:
        return pickled
    if way < 0.35:
        return legacy(pickled, storages)
    return zipped(pickled, storages, zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED)


def legacy(pickled: bytes, storages: Sequence[bytes] = ()) -> bytes:
    """Return the layout of `torch.save` before version 1.6."""
    head = (pickle.dumps(part, 2) for part in (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}))
    keys = pickle.dumps([str(i) for i in range(len(storages))], 2)
    body = b"".join(struct.pack("<q", len(storage) // 4) + storage for storage in storages)
    return b"".join(head) + pickled + keys + body


def zipped(pickled: bytes, storages: Sequence[bytes] = (), compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return the current layout of `torch.save`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for number, storage in enumerate(storages):
            archive.writestr(f"archive/data/{number}", storage)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def rewritten(rng: random.Random, content: bytes, change: object) -> bytes:
    """Return a zip archive in which one file is changed and all checksums are valid."""
    source, target = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    chosen = rng.choice([name for name in source.namelist() if name.endswith(".pkl")] * 3 + source.namelist())
    with zipfile.ZipFile(target, "w", rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])) as archive:
        for name in source.namelist():
            data = source.read(name)
            archive.writestr(name, change(rng, data) if name == chosen else data)  # type: ignore[operator]
        if rng.random() < 0.05:
            archive.comment = b"PK\x05\x06" + rng.randbytes(30)
    return target.getvalue()
