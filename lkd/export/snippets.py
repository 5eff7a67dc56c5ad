"""Code of a model card: preprocessing of an image, and use of each file without lkd."""

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
{pad}pixels = (pixels - np.float32(about["mean"])) / np.float32(about["std"])
batch = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])"""
_ABOUT = """\
import json

with open("preprocessing.json", encoding="utf-8") as file:
    about = json.load(file)
"""
_RESIZE = """\
if image.size != (width, height):
    rows, columns = about["resize"]["cover"]  # resize to cover this size, then crop the center
    if rows * image.width >= columns * image.height:
        columns = rows * image.width // image.height
    else:
        rows = columns * image.height // image.width
    image = image.resize((columns, rows), Image.Resampling.BILINEAR)
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    image = image.crop((left, top, left + width, top + height))
"""
_SIZES = (
    "The files accept images whose height and width are {multiples}at least {least} pixels; other images are padded "
    "with zeros on the right and at the bottom, before they are normalized."
)
_ANY_SIZE = "width, height = image.size\n"
_PAD = """\
step, least = about["size_step"], about["min_size"]
rows, columns = (-(-max(side, least) // step) * step for side in (height, width))
pixels = np.pad(pixels, ((0, rows - height), (0, columns - width), (0, 0)))  # on the right and at the bottom
"""
_MAP_ANSWER = """\
classes = logits[0].argmax(0)  # class of each pixel
{crop}for number in sorted(set(classes.flatten().tolist())):
    print(f"{{{name}}}: {{(classes == number).mean():.1%}} of the image")"""
_ONNX = """\
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
logits = session.run(["logits"], {{"image": batch}})[0]
{answer}"""
_TORCH = """\
import torch

network = torch.export.load("{file}").module()
logits = network(torch.from_numpy(batch)).detach().numpy()
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


_AUXILIARY = ("googlenet", "inception_v3")
"""Networks of torchvision with auxiliary heads, which lkd removes."""


def preparation(facts: Mapping[str, Any]) -> str:
    """Describe the preprocessing of an image in words and code.

    Args:
        facts: Content of `preprocessing.json`.
    """
    shape, output = (" x ".join(map(str, facts[name])) for name in ("shape", "output_shape"))
    text = (
        f"Input `image`: {facts['dtype']}, {facts['layout']} ({shape}). Output `logits`: {facts['output']} ({output})."
    )
    if _is_smaller(facts):
        text += " Interpolate the map to the size of the image (bilinear) before you select the class of each pixel."
    if "mean" not in facts:
        return f"{text} The preprocessing of the data is unknown to lkd. Below, `batch` is an array of this form."
    text += (
        f" Pixels from 0 to 255 ({facts['channels']}) are divided by 255 and normalized per channel as `(pixel - mean) "
        f"/ std`, with mean `{facts['mean']}` and std `{facts['std']}`."
    )
    resize = facts["resize"]
    if "cover" in resize:
        text += (
            f" An image of a different size is resized (bilinear) to cover {' x '.join(map(str, resize['cover']))}, "
            "and its center is cropped. (lkd decodes large JPEGs at a reduced size; their pixels differ slightly.)"
        )
    elif step := facts["size_step"]:
        multiples = f"multiples of {step} and " if step > 1 else ""
        text += f" {_SIZES.format(multiples=multiples, least=facts['min_size'])}"
    else:
        text += f" Images are resized by `{resize['by']}`."
    if not _is_prepared(facts):
        return text
    return (
        f"{text} This information is also in `preprocessing.json` and in each file, under the key `preprocessing`.\n\n"
        + _python(_PREPARE.format(resize=_resizing(facts), pad=_PAD if facts["size_step"] else ""))
    )


def _resizing(facts: Mapping[str, Any]) -> str:
    """Return the code that resizes an image to the input of the network, or reads its size if it is padded."""
    if facts["size_step"]:
        return _ANY_SIZE
    return _RESIZE if "cover" in facts["resize"] else ""


def _is_prepared(facts: Mapping[str, Any]) -> bool:
    """Return whether `preparation` contains code."""
    return facts.get("mode") is not None


def use(file: str, files: Collection[str], facts: Mapping[str, Any], made: Made | None) -> str:
    """Describe the use of a file.

    Args:
        file: Name of the file.
        files: Names of all files.
        facts: Content of `preprocessing.json`.
        made: Code that creates the network of the weights; None if they belong to more than one network.
    """
    answer = _answer(facts)
    if file.endswith(".onnx"):
        return f"`{file}` (`pip install onnxruntime`):\n\n" + _python(_ONNX.format(file=file, answer=answer))
    if file.endswith(".pt2"):
        return f"`{file}` (`pip install torch`):\n\n" + _python(_TORCH.format(file=file, answer=answer))
    text = f"`{file}` contains the weights by name (`pip install safetensors torch`)"
    then = f"logits = network(torch.from_numpy(batch)).detach().numpy()\n{answer}"
    if made is None:
        text += ". They belong to several parts of a module, which the other formats combine"
        imported, code = "", "print({name: tuple(tensor.shape) for name, tensor in weights.items()})"
    elif made.public:
        imported = f"import torch\nimport {made.library}"
        code = _LOADED.format(call=made.call, then=f"network.eval()\n{then}")
    elif PROGRAM in files:
        text += f", but no code. The network is created by `{made.call}`, or by the program in `{PROGRAM}`"
        imported, code = "import torch", _LOADED.format(call=f'torch.export.load("{PROGRAM}").module()', then=then)
    else:
        text += f", but no code. The network is created by `{made.call}`"
        imported = f"import torch\nimport {made.library}"
        code = _LOADED.format(call=made.call, then=f"network.eval()\n{then}")
    return f"{text}:\n\n{_python(_WEIGHTS.format(file=file, imported=imported, network=code))}"


def _answer(facts: Mapping[str, Any]) -> str:
    """Return the code that prints what the network predicts."""
    is_map = len(facts["output_shape"]) == 3 and "num_classes" in facts
    if "class_names" not in facts:
        return _MAP_ANSWER.format(crop=_crop(facts), name="number") if is_map else "print(logits)"
    about = "" if _is_prepared(facts) else _ABOUT  # the preprocessing code has already read it
    if is_map:
        return about + _MAP_ANSWER.format(crop=_crop(facts), name="about['class_names'][number]")
    return f'{about}print(about["class_names"][logits[0].argmax()])'


def _crop(facts: Mapping[str, Any]) -> str:
    """Return the code that removes the padding of an image from its map of classes."""
    if not (facts["size_step"] and _is_prepared(facts)):
        return ""
    if not _is_smaller(facts):
        return "classes = classes[:height, :width]  # without the padding\n"
    part = "round(len(classes) * height / rows)", "round(classes.shape[1] * width / columns)"
    return f"classes = classes[:{part[0]}, :{part[1]}]  # without the padding\n"


def _is_smaller(facts: Mapping[str, Any]) -> bool:
    """Return whether the output is a map that is smaller than the image."""
    return len(facts["output_shape"]) == 3 and facts["output_shape"][1:] != facts["shape"][1:]


class Made(NamedTuple):
    """Code that creates a network.

    Attributes:
        library: Module to import.
        call: Expression that creates the network.
        public: Whether the library is torchvision or timm.
    """

    library: str
    call: str
    public: bool


def made(network: Mapping[str, Any]) -> Made:
    """Return the code that creates a network without its trained weights.

    Args:
        network: Settings of the network, as in a config: `class_path` and `init_args`.
    """
    path = str(network["class_path"])
    start = ("weights", "pretrained")  # omitted, because these weights would be replaced
    given = {key: value for key, value in (network.get("init_args") or {}).items() if value is not None}
    own = {key: value for key, value in given.items() if key not in start}
    name, channels, small = own.get("name"), own.get("in_channels", 3), own.get("small_images")
    sizes = {key: value for key, value in own.items() if key in ("num_classes", "img_size", "patch_size")}
    if path == "lkd.models.torchvision_model" and name in _AUXILIARY:
        own = given  # pretrained weights determine whether the network normalizes its input again
        sizes |= {"aux_logits": False, "transform_input": "weights" in given, "init_weights": False}
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
