"""Published shapes, executed as compiled: ``python -m bratune.studies kernels --execute -o runs/executed``.

Every family of fused kernels that can compute a stage runs on the CPU as its PTX for a target
(`bratune.testing.executor`), forward and backward, in both half types, for one image, and is compared with
the reference in float64. A line per case on stdout and in ``executed.jsonl``; cases that the file holds
from the same code are not executed again, so that the same command goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bratune.kernels.fused.families import backward_families, forward_families
from bratune.problem import Problem
from bratune.variant import get_variant, stages

__all__ = ["TOLERANCES", "ExecutedCase", "cases", "execute", "hash_of", "run_case"]

# |x - reference| / |reference| in the 2-norm, for the output and every gradient.
TOLERANCES = {"float16": 1e-3, "bfloat16": 8e-3}
# Height, width and regions per side, the quickest first; the last takes hours.
SCENES = ((224, 224, 7), (512, 512, 8), (800, 1333, 16))


@dataclass(frozen=True)
class ExecutedCase:
    """A stage, the families that compute it, and what it is called."""

    name: str
    problem: Problem
    forward: str
    backward: str


def cases(scenes: Sequence[tuple[int, int, int]] = SCENES) -> Iterator[ExecutedCase]:
    """Every stage of every scene by every legal family, in both half types."""
    small = get_variant("biformer_small")
    for height, width, n_win in scenes:
        for dtype in TOLERANCES:
            found = stages(small, height, width, batch=1, n_win=n_win, dtype=dtype, direction="fwd-bwd")
            for stage in found:
                if stage.kind != "routed" or stage.problem is None:
                    continue
                name = f"{height}x{width} s{stage.index} {dtype}"
                forward, backward = forward_families(stage.problem), backward_families(stage.problem)
                for one, other in itertools.zip_longest(forward, backward):
                    yield ExecutedCase(name, stage.problem, one or forward[0], other or backward[0])


def run_case(case: ExecutedCase, target: str = "sm80") -> dict[str, Any]:
    """Execute one case: its findings, its errors by result, and what it took."""
    import torch

    from bratune.kernels.fused.backend import TritonBackend
    from bratune.kernels.reference import ReferenceBackend
    from bratune.testing.executor import executed

    p = case.problem
    seed = torch.Generator().manual_seed(0)
    packed = torch.randn(p.batch, p.height, p.width, 3 * p.channels, generator=seed)
    q, k, v = (x.detach().requires_grad_() for x in packed.to(getattr(torch, p.dtype)).chunk(3, -1))
    grad = torch.randn(q.shape, generator=seed).to(q.dtype)
    routes = torch.rand(p.batch, p.regions, p.kv_regions, generator=seed).argsort(-1)[..., : p.topk]
    started = time.monotonic()
    with executed(target) as findings:
        config = {"forward": case.forward, "backward": case.backward}
        out = TritonBackend().forward(q, k, v, routes.contiguous(), p, config)
        mine = (out, *torch.autograd.grad(out, (q, k, v), grad))
    seconds = time.monotonic() - started
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    true = ReferenceBackend().forward(q, k, v, routes, p)
    true_all = (true, *torch.autograd.grad(true, (q, k, v), grad.double()))
    errors = {
        name: float((x.detach().double() - y.detach()).norm() / y.detach().norm())
        for name, x, y in zip(("out", "dq", "dk", "dv"), mine, true_all, strict=True)
    }
    return {
        "findings": [str(x) for x in findings],
        "errors": errors,
        "instructions": findings.instructions,
        "seconds": round(seconds, 1),
    }


def execute(output: Path | None, only: str, budget: float | None, target: str = "sm80") -> bool:
    """Execute the cases whose names match and print them.

    Args:
        output: Folder of ``executed.jsonl``; None keeps nothing.
        only: Regular expression; the names are those that are printed.
        budget: Seconds after which no case is started.
        target: What kernels are compiled for, one of `bratune.testing.executor.TARGETS`.

    Returns:
        Whether every case was right and without a finding.
    """
    code = _code()
    path = output / "executed.jsonl" if output else None
    known = _known(path, code)
    end = None if budget is None else time.monotonic() + budget
    good = True
    for case in cases():
        name = f"{target} {case.name} {case.forward}, {case.backward}"
        if not re.search(only, name):
            continue
        found = known.get(name)
        if found is None:
            if end is not None and time.monotonic() >= end:
                print("the rest was not started: its time was spent", flush=True)
                return good
            found = run_case(case, target)
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                row = {"case": name, "code": code, "problem": dataclasses.asdict(case.problem), **found}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        limit = TOLERANCES[case.problem.dtype]
        right = all(error <= limit for error in found["errors"].values()) and not found["findings"]
        good = good and right
        errors = ", ".join(f"{key} {error:.1e}" for key, error in found["errors"].items())
        print(f"{name}: {'right' if right else 'WRONG'}, errors {errors}, {found['seconds']} s", flush=True)
        for finding in found["findings"]:
            print(f"  {finding}", flush=True)
    return good


def hash_of(files: Iterable[Path]) -> str:
    """What stands for the contents of files."""
    text = b"".join(path.read_bytes() for path in sorted(files) if path.is_file())
    return hashlib.sha256(text).hexdigest()[:16]


def _code() -> str:
    """What stands for the kernels and the executor as they are."""
    root = Path(__file__).resolve().parents[1]
    return hash_of([*(root / "kernels" / "fused").glob("*"), *(root / "testing").glob("*.py")])


def _known(path: Path | None, code: str) -> dict[str, dict[str, Any]]:
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.endswith("}")]
    return {row["case"]: row for row in rows if row["code"] == code}
