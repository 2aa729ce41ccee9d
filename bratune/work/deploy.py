"""Deployment: a model as a file of another runtime, and such a file as a module that runs there.

>>> write_file(FastModel(model, pack=False), images, Path("model.onnx"), "onnx")
>>> run = open_file(Path("model.onnx"), "onnx", threads=2)
>>> scores = run(images)

A graph settles on height and width, which decide about regions; its batch stays open unless it is asked to be
fixed. Under `torch.export` routed attention is made of PyTorch's operations, which every other tool knows.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bratune.errors import MissingPackageError, ProblemError

__all__ = [
    "RUNTIMES",
    "TARGETS",
    "Runtime",
    "RuntimeModel",
    "cached_file",
    "open_file",
    "read_notes",
    "require",
    "write_file",
]

# Kinds of files and how their names end.
TARGETS = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
# What must be installed to write and to run a file.
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "pt2": ()}
_PURPOSES = {"onnx": "writing and running ONNX files", "openvino": "writing and running OpenVINO files"}
# Texts that a file carries beside the graph stand under this word.
_NOTES = "bratune"
# Of files that were made for measuring, so many are kept.
_KEPT = 8


@dataclass(frozen=True)
class Runtime:
    """Another project's runtime, as a form of a whole model names it.

    Attributes:
        target: The kind of file that it reads.
        package: The distribution that it comes in.
        dtypes: Data types that it computes in on a CPU, by those of the model.
    """

    target: str
    package: str
    dtypes: Mapping[str, str]


RUNTIMES = {
    "onnxruntime": Runtime("onnx", "onnxruntime", {"float32": "float32"}),
    "openvino": Runtime("openvino", "openvino", {"float32": "float32", "bfloat16": "bfloat16"}),
    "openvino-bf16": Runtime("openvino", "openvino", {"float32": "bfloat16", "bfloat16": "bfloat16"}),
}


def require(target: str) -> None:
    """Raise `MissingPackageError` where a kind of file cannot be written and run here."""
    for package in _PACKAGES[target]:
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(package, _PURPOSES[target], "deploy")


def write_file(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    path: Path,
    target: str,
    *,
    notes: Mapping[str, str] | None = None,
    open_batch: bool = True,
) -> None:
    """Write a model as a file.

    Args:
        model: In evaluation, in float32, on the CPU.
        example: What it is called with; the first axis of every tensor is the batch.
        path: Where; OpenVINO puts a ``.bin`` with the weights beside it.
        target: A name of `TARGETS`.
        notes: Texts that the file carries, by name.
        open_batch: Let the file take any batch; otherwise it takes the example's.

    Raises:
        MissingPackageError: the tool is not installed.
        ProblemError: the model is no graph of PyTorch's operations, or settles on a batch.
    """
    require(target)
    program = _program(model, _tensors(example), open_batch=open_batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters about themselves
        try:
            _WRITERS[target](program, path, dict(notes or {}))
        except (RuntimeError, ValueError, NotImplementedError, torch.onnx.errors.OnnxExporterError) as error:
            raise ProblemError(f"the model cannot be written as {target}: {_first_line(error)}") from None


def _program(model: nn.Module, example: tuple[Tensor, ...], *, open_batch: bool) -> Any:
    """The graph of a model."""
    dynamic = None
    if open_batch:
        # A batch of one would be taken for a constant.
        example = tuple(torch.cat([x, x])[:2] if len(x) < 2 else x for x in example)
        batch = torch.export.Dim("batch")
        dynamic = tuple({0: batch} for _ in example)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(model, example, dynamic_shapes=dynamic, strict=False)
        except Exception as error:  # whatever a model does that no graph can follow
            if open_batch and "batch" in str(error):
                raise ProblemError(
                    "the model settles on one batch, so that its file cannot take any "
                    f"({_first_line(error)}); --batch-size N writes it for one"
                ) from None
            raise ProblemError(f"torch.export cannot follow the model: {_first_line(error)}") from None


def _write_onnx(program: Any, path: Path, notes: Mapping[str, str]) -> None:
    made = torch.onnx.export(program, dynamo=True, verbose=False)
    assert made is not None
    for name, text in notes.items():
        made.model.metadata_props[f"{_NOTES}.{name}"] = text
    _name_the_batch(made.model.graph)
    made.save(str(path))


def _name_the_batch(graph: Any) -> None:
    """Call the open axis ``batch``, whatever symbol torch.export has for it."""
    symbols = {axis.value for value in graph.inputs for axis in value.shape if not isinstance(axis, int)}
    for value in (*graph.inputs, *(out for node in graph.all_nodes() for out in node.outputs)):
        if value.shape is not None and not value.shape.is_static():
            axes = [_renamed(axis, symbols) for axis in value.shape]
            value.shape = type(value.shape)(axes)


def _renamed(axis: Any, symbols: Iterable[str]) -> int | str | None:
    if isinstance(axis, int):
        return axis
    if axis.value is None:  # not known: no two of these are said to be the same
        return None
    return re.sub(rf"\b({'|'.join(map(re.escape, symbols))})\b", "batch", axis.value)


def _write_openvino(program: Any, path: Path, notes: Mapping[str, str]) -> None:
    import openvino

    model = openvino.convert_model(program)
    for name, text in notes.items():
        model.set_rt_info(text, [_NOTES, name])
    openvino.save_model(model, str(path), compress_to_fp16=False)


def _write_pt2(program: Any, path: Path, notes: Mapping[str, str]) -> None:
    torch.export.save(program, str(path), extra_files={f"{_NOTES}.{n}": text for n, text in notes.items()})


_WRITERS: dict[str, Callable[[Any, Path, Mapping[str, str]], None]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "pt2": _write_pt2,
}


def read_notes(path: Path, target: str, names: Sequence[str]) -> dict[str, str]:
    """The texts that `write_file` put into a file, of those names that it has."""
    require(target)
    if target == "onnx":
        import onnx

        held = {p.key: p.value for p in onnx.load(str(path), load_external_data=False).metadata_props}
        return {name: held[f"{_NOTES}.{name}"] for name in names if f"{_NOTES}.{name}" in held}
    if target == "openvino":
        import openvino

        model = openvino.Core().read_model(str(path))
        there = [name for name in names if model.has_rt_info([_NOTES, name])]
        return {name: str(model.get_rt_info([_NOTES, name]).astype(str)) for name in there}
    files = {f"{_NOTES}.{name}": "" for name in names}
    torch.export.load(str(path), extra_files=files)
    return {name: files[f"{_NOTES}.{name}"] for name in names if files[f"{_NOTES}.{name}"]}


# --- running -----------------------------------------------------------------------------------------


class RuntimeModel(nn.Module):
    """A file in its runtime, called like the model that it was written from.

    Args:
        run: Takes and gives arrays of NumPy.
    """

    def __init__(self, run: Callable[[list[Any]], Sequence[Any]]) -> None:
        super().__init__()
        self._run = run
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        """Tensors on the CPU in, a tensor or a tuple of them out, in float32."""
        found = self._run([x.detach().float().contiguous().numpy() for x in inputs])
        outs = tuple(torch.from_numpy(out) for out in found)
        return outs[0] if len(outs) == 1 else outs


def open_file(
    path: Path, target: str, *, threads: int, dtype: str = "float32", shape: Sequence[int] | None = None
) -> nn.Module:
    """A file in the runtime that it was written for.

    Args:
        path: The file.
        target: A name of `TARGETS`.
        threads: As many as it may take, in one pool that is still between calls.
        dtype: Data type that it computes in; weights, inputs and outputs stay float32.
        shape: Of its only input, where it is called with no other: a runtime may plan for it.

    Raises:
        MissingPackageError: the runtime is not installed.
    """
    require(target)
    if target == "pt2":
        program: nn.Module = torch.export.load(str(path)).module()
        return program
    opened = _open_onnx if target == "onnx" else functools.partial(_open_openvino, dtype=dtype)
    return RuntimeModel(opened(path, threads, shape))


def _open_onnx(path: Path, threads: int, shape: Sequence[int] | None) -> Callable[[list[Any]], Sequence[Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that wait busily after a call would take the time of whoever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    if shape is not None:
        options.add_free_dimension_override_by_name("batch", shape[0])
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [held.name for held in session.get_inputs()]

    def run(arrays: list[Any]) -> Sequence[Any]:
        found: Sequence[Any] = session.run(None, dict(zip(names, arrays, strict=True)))
        return found

    return run


def _open_openvino(
    path: Path, threads: int, shape: Sequence[int] | None, *, dtype: str
) -> Callable[[list[Any]], Sequence[Any]]:
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    if shape is not None:
        model.reshape(list(shape))
    settings = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(arrays: list[Any]) -> Sequence[Any]:
        found = request.infer(arrays, share_inputs=True, share_outputs=False)
        return [found[i] for i in range(len(found))]

    return run


# --- files that are made to be measured --------------------------------------------------------------


def cached_file(key: Mapping[str, Any], target: str, make: Callable[[Path], None]) -> Path:
    """A file that is made once: for the same key, sources and versions it is found on disk.

    Args:
        key: What the graph and its weights follow from.
        target: A name of `TARGETS`.
        make: Writes the file to the path that it is given.
    """
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", *_PACKAGES[target])]
    text = repr([sorted(key.items()), target, versions, _source_digest()])
    folder = _cache_folder() / hashlib.sha256(text.encode()).hexdigest()[:16]
    path = folder / f"model{TARGETS[target]}"
    if path.exists():
        os.utime(folder)
        return path
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        fresh = Path(scratch) / "files"
        fresh.mkdir()
        make(fresh / path.name)
        try:
            fresh.rename(folder)
        except OSError:  # another process was faster
            if not path.exists():
                raise
    _forget_all_but(_KEPT, folder.parent)
    return path


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "bratune" / "deploy"


def _forget_all_but(count: int, folder: Path) -> None:
    found = sorted(
        (f for f in folder.iterdir() if not f.name.startswith(".")), key=lambda f: f.stat().st_mtime
    )
    for old in found[:-count]:
        shutil.rmtree(old, ignore_errors=True)


@functools.cache
def _source_digest() -> str:
    """What identifies the sources that a graph is made from."""
    spec = importlib.util.find_spec("bratune.kernels")
    assert spec is not None
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for place in spec.submodule_search_locations or ():
        for file in sorted(Path(place).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _tensors(example: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (example,) if isinstance(example, Tensor) else tuple(example)


def _first_line(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line[:300]
