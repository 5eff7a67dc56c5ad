"""The files of an export: each is written once, and run from the disk."""

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

from lkd.features.extractor import logits_of
from lkd.loading import Answer, network_of
from lkd.modules import ClassificationModule

Run: TypeAlias = Callable[[Tensor], Tensor]
"""Images `(B, C, H, W)` to logits `(B, K)`."""
INPUT, OUTPUT = "image", "logits"
METADATA = "preprocessing"
"""The key under which each file has what `preprocessing.json` says."""
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_BATCH = {0: Dim("batch", min=1)}
_LARGEST = 2**31 - 2**26  # bytes of weights that go into one ONNX file: protobuf has room for 2 GiB


class Network:
    """What a module answers with, and what is written of it.

    Args:
        module: A trained module, in eval mode.
        example: Some of its images `(B, C, H, W)`.
    """

    def __init__(self, module: ClassificationModule, example: Tensor) -> None:
        # Two, as for one torch.export would make a program for one; blank, as a program's file has its example in it.
        self.blank = torch.zeros(2, *example.shape[1:], dtype=example.dtype)
        self.answering = network_of(module)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """Logits `(B, K)`."""
        return logits_of(self.answering(image))

    @cached_property
    def num_outputs(self) -> int:
        """Number of logits."""
        return int(self(self.blank).shape[1])

    @property
    def prefix(self) -> str:
        """What stands before the names of weights, and is left out in files: these have the checkpoint's own."""
        return "module." if isinstance(self.answering, Answer) else ""

    @cached_property
    def program(self) -> ExportedProgram:
        """The network as `torch.export` sees it, for batches of any size.

        Raises:
            ValueError: If it cannot be traced.
        """
        network = self.answering
        traced = copy(network)  # with the same weights under the same names, and logits as its answer
        traced.forward = lambda image: logits_of(network.forward(image))
        with torch.no_grad(), _quiet():
            try:
                program = torch.export.export(traced, (self.blank,), dynamic_shapes=(_BATCH,))
            except Exception as error:  # whatever someone's forward pass makes of symbolic tensors
                raise ValueError(
                    f"torch.export cannot trace {type(network).__name__} for batches of any size ({_reason(error)}); "
                    "--format safetensors writes its weights alone"
                ) from error
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        return program

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The network's whole state; of a module that answers itself, what it reads for that."""
        state: dict[str, Tensor] = self.answering.state_dict()
        if self.prefix:
            state = {name: tensor for name, tensor in state.items() if name in self._read}
        # Copies, as a safetensors file takes no tensor under two names.
        return {name.removeprefix(self.prefix): tensor.detach().clone().contiguous() for name, tensor in state.items()}

    @property
    def num_parameters(self) -> int:
        """How many parameters are written."""
        found = dict(self.answering.named_parameters())
        return sum(found[name].numel() for name in found if name.removeprefix(self.prefix) in self.weights)

    @property
    def _read(self) -> set[str]:
        used = {node.name for node in self.program.graph.nodes if node.users}
        specs = self.program.graph_signature.input_specs
        return {str(spec.target) for spec in specs if spec.arg.name in used}


def write_safetensors(network: Network, path: Path, metadata: str) -> Run:
    """Write the weights.

    Args:
        network: Whose.
        path: The file.
        metadata: JSON, kept in it.

    Returns:
        The network with the file's weights, and no others.
    """
    path.write_bytes(save(network.weights, {"format": "pt", METADATA: metadata}))  # save_file's only its owner may read
    answering, state = network.answering, network.answering.state_dict()
    gone = {n: torch.full_like(t, torch.nan if t.is_floating_point() else 0) for n, t in state.items()}
    loaded = {f"{network.prefix}{name}": tensor for name, tensor in load_file(path).items()}
    return lambda image: logits_of(functional_call(answering, {**gone, **loaded}, (image,), tie_weights=False))


def write_torch(network: Network, path: Path, metadata: str) -> Run:
    """Write a program for `torch.export.load`; as `write_safetensors`."""
    with _quiet():
        torch.export.save(network.program, path, extra_files={f"{METADATA}.json": metadata})
        module = torch.export.load(path).module()
    return module.__call__


def write_onnx(network: Network, path: Path, metadata: str) -> Run:
    """Write an ONNX file; as `write_safetensors`."""
    size = sum(tensor.nbytes for tensor in network.program.state_dict.values())
    with _quiet():
        try:
            model = torch.onnx.export(
                network.program,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=(_BATCH,),  # the program has it; this is the dimension's name
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # an operation that ONNX lacks, as the exporter tells it
            name = type(network.answering).__name__
            raise ValueError(f"PyTorch cannot write {name} as ONNX ({_reason(error)}); take --format torch") from error
        if model is None:
            raise ValueError("torch.onnx.export has made no program; take --format torch")
        for node in model.model.graph:
            node.metadata_props.clear()  # notes of the exporter, longer than the weights of a small network
        model.model.metadata_props[METADATA] = metadata
        model.save(path, external_data=size > _LARGEST)
    return run_onnx(path)


def run_onnx(path: Path) -> Run:
    """What an ONNX file answers, in onnxruntime on the CPU.

    Args:
        path: The file.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run([OUTPUT], {INPUT: image.numpy()})[0])


def write_int8(source: Path, path: Path, images: Iterable[Tensor]) -> Run:
    """Write an ONNX file anew, with weights and activations of 8 bits (QuantizeLinear, DequantizeLinear).

    Weights are quantised by channel, activations by the least and largest value that images bring about.

    Args:
        source: The float32 file.
        path: The file to write.
        images: Batches of training images `(B, C, H, W)`.

    Returns:
        What the file answers.
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
            quant_pre_process(source, prepared, skip_symbolic_shape=True)  # the exporter has noted the shapes
            quantize_static(prepared, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **signed)
        except Exception as error:
            raise ValueError(
                f"onnxruntime cannot quantise {source.name} ({_reason(error)}); leave out --int8"
            ) from error
    prepared.unlink()
    return run_onnx(path)


WRITERS: Mapping[str, tuple[str, Callable[[Network, Path, str], Run]]] = {
    "safetensors": ("model.safetensors", write_safetensors),
    "torch": ("model.pt2", write_torch),
    "onnx": ("model.onnx", write_onnx),
}
"""Each format's file, and what writes it."""
INT8_FILE = "model.int8.onnx"


def check_formats(formats: Iterable[str], int8: bool) -> None:
    """See that what is asked for can be written here.

    Args:
        formats: Names of formats.
        int8: Whether an ONNX file of 8 bits is wanted too.

    Raises:
        ValueError: If there is no such format, or something is missing for it.
    """
    formats = list(formats)
    unknown = [name for name in formats if name not in WRITERS]
    if unknown or not formats:
        got = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"--format takes {', '.join(WRITERS)}, or several with commas between, got {got}")
    if int8 and "onnx" not in formats:
        raise ValueError("--int8 is for ONNX alone, torch's programs stay float32; add onnx to --format")
    missing = [name for name in _NEEDED if find_spec(name) is None] if "onnx" in formats else []
    if missing:
        raise ValueError(
            f"--format onnx needs {' and '.join(missing)}, which is not installed; pip install 'lkd[onnx]', or take "
            "--format safetensors,torch"
        )


def _reason(error: Exception) -> str:
    """An exporter's error in short: behind its first line come pages of advice and graphs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on their own inside, some of which they print."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def as_json(content: object) -> str:
    """JSON as it stands in every file."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
