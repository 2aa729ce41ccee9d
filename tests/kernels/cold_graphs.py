"""What a fresh process finds out about graphs, a JSON line each: an eager call first would hide most faults.

Run by `test_graphs`; ``python tests/kernels/cold_graphs.py`` prints the same.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import bratune
from bratune.kernels.layer import NCHWBiLevelRoutingAttention

BATCHES = (4, 2, 5)


def layers() -> nn.Module:
    """Two layers, so that the second asks for a place after the graph has read the first's."""
    sizes: dict[str, Any] = {"n_win": 2, "topk": 2}
    return nn.Sequential(
        bratune.BiLevelRoutingAttention(32, num_heads=1, **sizes),
        bratune.BiLevelRoutingAttention(32, num_heads=2, backend="gather", **sizes),
    ).eval()


def compiled(make: Callable[[], nn.Module], shape: tuple[int, ...], **options: Any) -> dict[str, Any]:
    """Graphs and breaks of a model that never ran, and how far its results are from eager ones."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = make()
    fast = torch.compile(model, backend="eager", **options)
    with torch.no_grad():
        images = [torch.randn(batch, *shape) for batch in (*BATCHES, 0)]
        found = [fast(x) for x in images]
        apart = [float((y - model(x)).abs().max()) for x, y in zip(images[:-1], found, strict=False)]
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sorted(counters["graph_break"]),
        "apart": max(apart),
        "empty": list(found[-1].shape),
    }


def other_batches(run: Callable[[Tensor], Any], model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """How far a graph that was made from a batch of two is from eager at one, two and five images."""
    apart = []
    for batch in (1, 2, 5):
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            apart.append(float((torch.as_tensor(run(x)) - model(x)).abs().max()))
    return {"apart": max(apart)}


def exported(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """`torch.export` with an open batch."""
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, *shape),), dynamic_shapes=({0: batch},))
    return other_batches(program.module(), model, shape)


def traced(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """`torch.jit.trace`, and the warnings of it that a number was not followed."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trace: Any = torch.jit.trace
        graph = trace(model, (torch.randn(2, *shape),), check_trace=False)
    lost = [str(w.message) for w in said if w.category.__name__ == "TracerWarning"]
    return {**other_batches(graph, model, shape), "warnings": lost}


def main() -> None:
    """Print what is found, by name."""
    torch.manual_seed(0)
    shape = (8, 8, 32)
    nchw = NCHWBiLevelRoutingAttention(32, num_heads=2, n_win=2, topk=2).eval()
    tasks: dict[str, Callable[[], dict[str, Any]]] = {
        "compile-fullgraph": lambda: compiled(layers, shape, fullgraph=True),
        "compile-default": lambda: compiled(layers, shape),
        "compile-dynamic": lambda: compiled(layers, shape, dynamic=True, fullgraph=True),
        "export": lambda: exported(layers(), shape),
        "export-nchw": lambda: exported(nchw, (32, 9, 9)),
        "trace": lambda: traced(layers(), shape),
        "trace-nchw": lambda: traced(nchw, (32, 9, 9)),
    }
    for name, task in tasks.items():
        try:
            found = task()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
