"""Files of an export: each is written, loaded again, and run."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import copy
from functools import cached_property
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.func import functional_call

from lkd.loading import ModuleLogits, network_of
from lkd.modules import ClassificationModule

Run: TypeAlias = Callable[[Tensor], Tensor]
"""Function from images `(B, C, H, W)` to logits, for example `(B, K)`."""
INPUT, OUTPUT = "image", "logits"
METADATA = "preprocessing"
"""Key of the content of `preprocessing.json` in each file."""
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_STEPS = (1, 2, 4, 8, 16, 32)
"""Candidates for `size_step`: 1 stands for any size; strides of a network may require multiples of a larger step."""
_LEAST = 64
"""Minimum height and width of images, unless the test images are smaller. Strided layers require some pixels."""
_LARGEST = 2**31 - 2**26  # maximum bytes of weights in one ONNX file; protobuf is limited to 2 GiB


class Network:
    """Network of a trained module, prepared for export.

    Args:
        module: Trained module, in eval mode.
        example: Example images `(B, C, H, W)`.
        traced: Whether the network is exported as a program, and not only as weights.
    """

    def __init__(self, module: ClassificationModule, example: Tensor, traced: bool = True) -> None:
        # Two images, because torch.export specializes a batch size of one; blank, because the file contains them.
        self.blank = torch.zeros(2, *example.shape[1:], dtype=example.dtype)
        self.model, self.task = network_of(module), module.task
        self._traced = traced

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """Return the logits, for example `(B, K)`."""
        return self.read(self.model(image))

    def read(self, output: Any) -> Tensor:
        """Return the logits contained in the output of the network."""
        logits: Tensor = self.task.logits(output)
        return logits

    @cached_property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the logits of one image of the test set, for example `(K,)` or `(K, h, w)`."""
        return tuple(self(self.blank).shape[1:])

    @property
    def num_outputs(self) -> int | None:
        """Number of classes that the network distinguishes; `None` if it has none."""
        return self.output_shape[0] if self.task.has_classes else None

    @property
    def size_step(self) -> int | None:
        """Step of the image heights and widths that the files accept; `None` if the size is fixed.

        Only networks that return maps, such as `(B, K, h, w)`, accept images of different sizes.
        """
        return self._traced_program[1] if self._traced else next(iter(self._steps), None)

    @property
    def prefix(self) -> str:
        """Prefix of the weight names, which is removed in the files so that they match those in the checkpoint."""
        return "module." if isinstance(self.model, ModuleLogits) else ""

    @property
    def program(self) -> ExportedProgram:
        """Program of `torch.export`, for batches of any size and images of the sizes that `size_step` allows.

        Raises:
            ValueError: If the network cannot be traced.
        """
        return self._traced_program[0]

    @property
    def dynamic_shapes(self) -> dict[int, Any]:
        """Dynamic dimensions of a batch of images in the program."""
        return self._dimensions(self.size_step)

    @property
    def min_size(self) -> int:
        """Minimum height and width of images, if their size is not fixed."""
        return min(_LEAST, int(self.blank.shape[2]), int(self.blank.shape[3]))

    @property
    def _steps(self) -> Iterator[int]:
        """Steps of image sizes that the network accepts, smallest first."""
        if not self.blank.dim() == len(self.output_shape) + 1 == 4:
            return
        for step in _STEPS:
            try:
                rows, columns = self(self.sized(step)).shape[2:]
            except Exception:  # a forward pass may raise anything for an image of another size
                continue
            if (rows, columns) != self.output_shape[1:]:
                yield step

    def sized(self, step: int) -> Tensor:
        """Return blank images `(2, C, H, W)` whose size differs from that of the test images.

        Args:
            step: Step of the height and width.
        """
        height, width = (step * max(2, side // step) for side in self.blank.shape[2:])
        return self.blank.new_zeros(*self.blank.shape[:2], height + step, width + 2 * step)

    @cached_property
    def _traced_program(self) -> tuple[ExportedProgram, int | None]:
        reasons = []
        for step in self._steps:
            found = self._traced_or_reason(step)
            if not isinstance(found, str):
                return found, step
            reasons.append(found)
        try:
            program = self._trace(None)
        except Exception as error:
            raise ValueError(
                f"torch.export cannot trace {type(self.model).__name__} for batches of any size ({_reason(error)}); "
                "use --format safetensors to export only its weights"
            ) from error
        if reasons:
            height, width = self.blank.shape[2:]
            warnings.warn(
                f"the exported files accept only images of {width}x{height} pixels, because torch.export cannot trace "
                f"{type(self.model).__name__} for other sizes ({reasons[0]})",
                stacklevel=2,
            )
        return program, None

    def _traced_or_reason(self, step: int) -> ExportedProgram | str:
        try:
            return self._trace(step)
        except Exception as error:  # a forward pass may raise anything for symbolic tensors
            return _reason(error)

    def _trace(self, step: int | None) -> ExportedProgram:
        traced = copy(self.model)  # the same weights and names, but returns only the logits
        traced.forward = lambda image: self.read(self.model.forward(image))
        blank = self.blank if step is None else self.sized(step)
        with torch.no_grad(), _quiet():
            program = torch.export.export(traced, (blank,), dynamic_shapes=(self._dimensions(step),))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # contains local paths
        return program

    def _dimensions(self, step: int | None) -> dict[int, Any]:
        """Return the dynamic dimensions of a batch of images for a step of the height and width."""
        found = {0: Dim("batch", min=1)}
        if step is None:
            return found
        least = -(-self.min_size // step)
        if step == 1:
            return found | {2: Dim("height", min=least), 3: Dim("width", min=least)}
        return found | {2: step * Dim("rows", min=least), 3: step * Dim("columns", min=least)}

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """State dict of the network; if the module computes the logits itself, only the tensors that it reads."""
        state: dict[str, Tensor] = self.model.state_dict()
        if self.prefix:
            state = {name: tensor for name, tensor in state.items() if name in self._read}
        # Copies, because safetensors does not allow shared tensors.
        return {name.removeprefix(self.prefix): tensor.detach().clone().contiguous() for name, tensor in state.items()}

    @property
    def num_parameters(self) -> int:
        """Number of exported parameters."""
        found = dict(self.model.named_parameters())
        return sum(found[name].numel() for name in found if name.removeprefix(self.prefix) in self.weights)

    @property
    def _read(self) -> set[str]:
        used = {node.name for node in self.program.graph.nodes if node.users}
        specs = self.program.graph_signature.input_specs
        return {str(spec.target) for spec in specs if spec.arg.name in used}


def write_safetensors(network: Network, path: Path, metadata: str) -> Run:
    """Write the weights of a network to a safetensors file.

    Args:
        network: The network.
        path: Path of the file.
        metadata: JSON text that is stored in the file.

    Returns:
        Function that runs the network with the weights of the file, and NaN or 0 for all others.
    """
    path.write_bytes(save(network.weights, {"format": "pt", METADATA: metadata}))  # save_file sets mode 0600
    state = network.model.state_dict()
    gone = {n: torch.full_like(t, torch.nan if t.is_floating_point() else 0) for n, t in state.items()}
    loaded = {f"{network.prefix}{name}": tensor for name, tensor in load_file(path).items()}
    values = {**gone, **loaded}
    return lambda image: network.read(functional_call(network.model, values, (image,), tie_weights=False))


def write_torch(network: Network, path: Path, metadata: str) -> Run:
    """Write a program for `torch.export.load`. The arguments are those of `write_safetensors`."""
    with _quiet():
        torch.export.save(network.program, path, extra_files={f"{METADATA}.json": metadata})
        module = torch.export.load(path).module()
    return module.__call__


def write_onnx(network: Network, path: Path, metadata: str) -> Run:
    """Write an ONNX file. The arguments are those of `write_safetensors`.

    Raises:
        ValueError: If PyTorch cannot export the network.
    """
    size = sum(tensor.nbytes for tensor in network.program.state_dict.values())
    with _quiet():
        try:
            model = torch.onnx.export(
                network.program,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=(network.dynamic_shapes,),  # already dynamic in the program; this names the dimensions
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # such as an operation that ONNX does not support
            name = type(network.model).__name__
            raise ValueError(f"PyTorch cannot export {name} as ONNX ({_reason(error)}); use --format torch") from error
        if model is None:
            raise ValueError("torch.onnx.export returned no program; use --format torch")
        for node in model.model.graph:
            node.metadata_props.clear()  # debug information, larger than the weights of a small network
        model.model.metadata_props[METADATA] = metadata
        model.save(path, external_data=size > _LARGEST)
    return run_onnx(path)


def run_onnx(path: Path) -> Run:
    """Return a function that runs an ONNX file in onnxruntime on the CPU.

    Args:
        path: Path of the file.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run([OUTPUT], {INPUT: image.numpy()})[0])


def write_int8(source: Path, path: Path, images: Iterable[Tensor]) -> Run:
    """Quantize an ONNX file to 8-bit weights and activations (QuantizeLinear, DequantizeLinear).

    Weights are quantized per channel, activations by their minimum and maximum over the calibration images.

    Args:
        source: Path of the float32 file.
        path: Path of the quantized file.
        images: Batches of training images `(B, C, H, W)` for calibration.

    Returns:
        Function that runs the quantized file.

    Raises:
        ValueError: If onnxruntime cannot quantize the network.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    prepared = path.with_suffix(".prepared")
    signed = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    with _quiet():
        try:
            quant_pre_process(source, prepared, skip_symbolic_shape=True)  # the exporter has added the shapes
            quantize_static(prepared, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **signed)
        except Exception as error:
            raise ValueError(f"onnxruntime cannot quantize {source.name} ({_reason(error)}); remove --int8") from error
    prepared.unlink()
    return run_onnx(path)


WRITERS: Mapping[str, tuple[str, Callable[[Network, Path, str], Run]]] = {
    "safetensors": ("model.safetensors", write_safetensors),
    "torch": ("model.pt2", write_torch),
    "onnx": ("model.onnx", write_onnx),
}
"""File name and write function of each format."""
INT8_FILE = "model.int8.onnx"


def check_formats(formats: Iterable[str], int8: bool) -> None:
    """Check that the formats exist and their dependencies are installed.

    Args:
        formats: Names of formats.
        int8: Whether an 8-bit ONNX file is requested as well.

    Raises:
        ValueError: If a format is unknown, or one of its dependencies is missing.
    """
    formats = list(formats)
    unknown = [name for name in formats if name not in WRITERS]
    if unknown or not formats:
        got = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"--format must be {', '.join(WRITERS)}, or several of them separated by commas, got {got}")
    if int8 and "onnx" not in formats:
        raise ValueError("--int8 is only available for ONNX; add onnx to --format")
    missing = [name for name in _NEEDED if find_spec(name) is None] if "onnx" in formats else []
    if missing:
        raise ValueError(
            f"--format onnx requires {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed; run pip install 'lightning-kd[onnx]', or use --format safetensors,torch"
        )


def _reason(error: Exception) -> str:
    """Return the first line of an exporter's error, without the pages of advice and graphs that follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress logging, warnings and printed output of the exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def as_json(content: object) -> str:
    """Format an object as JSON for all files of an export."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
