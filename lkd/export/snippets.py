"""Code for a model card: how an image is prepared, and how each file is used, without lkd."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

PROGRAM = "model.pt2"

_PREPARE = """\
import json
import numpy as np
from PIL import Image

with open("preprocessing.json", encoding="utf-8") as file:
    about = json.load(file)
channels, height, width = about["shape"]
image = Image.open("image.png").convert(about["mode"])
{resize}pixels = np.asarray(image, np.float32).reshape(height, width, channels) / 255
pixels = (pixels - np.float32(about["mean"])) / np.float32(about["std"])
batch = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])"""
_ABOUT = """\
import json

with open("preprocessing.json", encoding="utf-8") as file:
    about = json.load(file)
"""
_RESIZE = """\
if image.size != (width, height):
    rows, columns = about["resize"]["cover"]  # scale until this is covered, then cut out the centre
    if rows * image.width >= columns * image.height:
        columns = rows * image.width // image.height
    else:
        rows = columns * image.height // image.width
    image = image.resize((columns, rows), Image.Resampling.BILINEAR)
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    image = image.crop((left, top, left + width, top + height))
"""
_ONNX = """\
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
logits = session.run(["logits"], {{"image": batch}})[0]
{answer}"""
_TORCH = """\
import torch

network = torch.export.load("{file}").module()
logits = network(torch.from_numpy(batch)).detach()
{answer}"""
_WEIGHTS = """\
{imported}
from safetensors.torch import load_file

weights = load_file("{file}")
{network}"""
_LOADED = """\
network = {call}
network.load_state_dict(weights)
{then}"""


def preparation(facts: Mapping[str, Any]) -> str:
    """How an image becomes input, in words and code.

    Args:
        facts: What `preprocessing.json` says.
    """
    shape = " x ".join(map(str, facts["shape"]))
    said = f"`image`: {facts['dtype']}, {facts['layout']} ({shape}); the answer is `logits`, before softmax."
    if "mean" not in facts:
        return f"{said} How the data made it is not known to lkd. Below, `batch` is such an array."
    said += (
        f" Pixels of 0 to 255 ({facts['channels']}) are divided by 255, then `(pixel - mean) / std` by channel, with "
        f"mean `{facts['mean']}` and std `{facts['std']}`."
    )
    resize = facts["resize"]
    if "cover" in resize:
        said += (
            f" An image of another size is scaled (bilinear) until it covers {' x '.join(map(str, resize['cover']))}, "
            "and its centre is cut out. (lkd decodes large JPEGs at a reduced size; their pixels differ a little.)"
        )
    else:
        said += f" Images are brought to size by `{resize['by']}`."
    if not _is_prepared(facts):
        return said
    return f"{said} `preprocessing.json` says the same, and so does each file, under `preprocessing`.\n\n" + _python(
        _PREPARE.format(resize=_RESIZE if "cover" in resize else "")
    )


def _is_prepared(facts: Mapping[str, Any]) -> bool:
    """Whether `preparation` has code."""
    return facts.get("mode") is not None


def use(file: str, files: Collection[str], facts: Mapping[str, Any], made: Made | None) -> str:
    """How a file is used.

    Args:
        file: Its name.
        files: The names of all files.
        facts: What `preprocessing.json` says.
        made: How the network is made that the weights are of; None if they are of more than one network.
    """
    answer = "print(logits)"
    if "class_names" in facts:
        about = "" if _is_prepared(facts) else _ABOUT  # the code that prepares an image has read it
        answer = f'{about}print(about["class_names"][logits[0].argmax()])'
    if file.endswith(".onnx"):
        return f"`{file}` (`pip install onnxruntime`):\n\n" + _python(_ONNX.format(file=file, answer=answer))
    if file.endswith(".pt2"):
        return f"`{file}` (`pip install torch`):\n\n" + _python(_TORCH.format(file=file, answer=answer))
    said = f"`{file}` has the weights by name (`pip install safetensors torch`)"
    then = f"logits = network(torch.from_numpy(batch)).detach()\n{answer}"
    if made is None:
        said += "; they are of several parts of a module, which the other formats join"
        imported, code = "", "print({name: tuple(tensor.shape) for name, tensor in weights.items()})"
    elif made.public:
        imported = f"import torch\nimport {made.library}"
        code = _LOADED.format(call=made.call, then=f"network.eval()\n{then}")
    elif PROGRAM in files:
        said += f", and no code; that is `{made.call}`, or the program in `{PROGRAM}`"
        imported, code = "import torch", _LOADED.format(call=f'torch.export.load("{PROGRAM}").module()', then=then)
    else:
        said += f", and no code; that is `{made.call}`"
        imported = f"import torch\nimport {made.library}"
        code = _LOADED.format(call=made.call, then=f"network.eval()\n{then}")
    return f"{said}:\n\n{_python(_WEIGHTS.format(file=file, imported=imported, network=code))}"


class Made(NamedTuple):
    """How a network is made.

    Attributes:
        library: What has its code.
        call: The call that makes it.
        public: Whether the library is one that many have: torchvision or timm.
    """

    library: str
    call: str
    public: bool


def made(network: Mapping[str, Any]) -> Made:
    """How a network is made, with weights of its own yet to be loaded.

    Args:
        network: Its settings, as in a config: `class_path` and `init_args`.
    """
    path = str(network["class_path"])
    start = ("weights", "pretrained")  # which would only be loaded to be replaced
    own = {key: value for key, value in (network.get("init_args") or {}).items() if value is not None}
    own = {key: value for key, value in own.items() if key not in start}
    name, channels, small = own.get("name"), own.get("in_channels", 3), own.get("small_images")
    sizes = {key: value for key, value in own.items() if key in ("num_classes", "img_size", "patch_size")}
    if path == "lkd.models.timm_model" and not small:
        return Made("timm", f"timm.create_model({name!r}, {_arguments(sizes | {'in_chans': channels})})", True)
    if path == "lkd.models.torchvision_model" and not small and channels == 3:
        return Made("torchvision", f"torchvision.models.get_model({name!r}, {_arguments(sizes)})", True)
    library = path.rpartition(".")[0]
    return Made(library, f"{path}({_arguments(own)})", library.split(".")[0] in ("torchvision", "timm"))


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _python(code: str) -> str:
    return f"```python\n{code.strip()}\n```"
