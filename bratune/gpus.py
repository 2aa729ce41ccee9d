"""GPUs that are known by name: the table behind ``--gpu a100`` and ``bratune list gpus``.

The table is ``bratune/data/gpus.csv`` (its sources and how far each number is trusted:
``bratune/data/README.md``); an empty cell means that no source was found. What a device reports about
itself always wins over the table.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.resources
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bratune.errors import ConfigError, UnknownNameError, UsageError
from bratune.files import read_yaml
from bratune.text import NAME, one_line

if TYPE_CHECKING:
    from bratune.machine import Machine

__all__ = [
    "GPU",
    "check_dtype",
    "describe_choice",
    "from_machine",
    "load_spec",
    "match",
    "resolve",
    "slug",
    "table",
    "why_not_dtype",
]


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One board. Rates are dense peaks with float32 accumulation; None where no source was found.

    Attributes:
        key: Short name, as ``--gpu`` takes it.
        name: Marketing name of the one board that the key stands for.
        aliases: Other spellings of the key.
        name_pattern: Regular expression of the name that the driver reports.
        compute_capability: ``"8.0"``; the architecture name of an AMD part (``gfx942``).
        boost_mhz: Highest clock of the specification.
        memory_gbps: Nominal memory bandwidth in GB/s.
        l2_mib: Last-level cache in MiB.
        tdp_w: Board power in watts.
    """

    key: str
    name: str
    aliases: tuple[str, ...] = ()
    name_pattern: str = ""
    architecture: str = ""
    compute_capability: str = ""
    sm_count: int | None = None
    boost_mhz: float | None = None
    memory_gib: float | None = None
    memory_gbps: float | None = None
    l2_mib: float | None = None
    smem_per_sm_kib: float | None = None
    smem_per_block_optin_kib: float | None = None
    registers_per_sm: int | None = None
    max_warps_per_sm: int | None = None
    fp32_tflops: float | None = None
    fp16_tensor_tflops: float | None = None
    bf16_tensor_tflops: float | None = None
    tf32_tensor_tflops: float | None = None
    fp64_tflops: float | None = None
    tdp_w: float | None = None
    note: str = ""

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability as two numbers; (0, 0) for a part that has none."""
        major, _, minor = self.compute_capability.partition(".")
        return (int(major), int(minor)) if minor.isdigit() else (0, 0)

    def peak_tflops(self, dtype: str) -> float | None:
        """Dense matrix-product peak in 10^12 operations a second; None where unknown.

        float32 means full float32: TF32 is a setting of torch and off by default.
        """
        return {
            "float16": self.fp16_tensor_tflops,
            "bfloat16": self.bf16_tensor_tflops,
            "float32": self.fp32_tflops,
            "float64": self.fp64_tflops,
        }.get(dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return dataclasses.asdict(self) | {"aliases": list(self.aliases)}


_INTEGERS = {"sm_count", "registers_per_sm", "max_warps_per_sm"}
_TEXTS = {"key", "name", "name_pattern", "architecture", "compute_capability", "note"}
# What becomes part of paths and commands.
_SHAPES = {"key": re.compile(NAME), "compute_capability": re.compile(r"[0-9]{1,3}\.[0-9]|gfx[0-9a-f]+")}
_SHAPED = {
    "key": "a name of letters, digits and ._+-",
    "compute_capability": "two numbers, as 9.0, or gfx942",
}
_LARGEST = 1e12  # beyond any board
_NUMBERS = {f.name for f in dataclasses.fields(GPU)} - _TEXTS - {"aliases"}
_MIG = re.compile(r"\s+MIG\s+(?P<slices>\d+)g\.(?P<memory>\d+)gb.*$")


@functools.cache
def table() -> tuple[GPU, ...]:
    """Every known board, in the order of the table."""
    text = importlib.resources.files("bratune.data").joinpath("gpus.csv").read_text("utf-8")
    boards = []
    for row in csv.DictReader(text.splitlines()):
        values: dict[str, Any] = {name: row[name].strip() for name in _TEXTS - {"name_pattern"}}
        values["name_pattern"] = row["nvml_name_pattern"].strip()
        values["aliases"] = tuple(filter(None, row["aliases"].split(";")))
        for name in _NUMBERS:
            cell = row[name].strip()
            number = int if name in _INTEGERS else float
            values[name] = number(cell) if cell else None
        boards.append(GPU(**values))
    return tuple(boards)


def resolve(key: str) -> GPU:
    """The board of a short key or alias; raises `UnknownNameError`."""
    name = _spelling(key)
    for board in table():
        if name == board.key or name in board.aliases:
            return board
    raise UnknownNameError("GPU", key, (board.key for board in table()))


def describe_choice(key: str) -> str:
    """How a key was understood: ``a100 -> A100-SXM4-80GB (documented default; also: ...)``.

    Raises:
        UnknownNameError: see `resolve`.
    """
    board, name = resolve(key), _spelling(key)
    family = [b.key for b in table() if b.key != board.key and b.key.startswith(name + "-")]
    if not family:
        return f"{name} -> {board.name}"
    return f"{name} -> {board.name} (documented default; also: {', '.join(family)})"


def _spelling(key: str) -> str:
    return re.sub(r"[\s_]+", "-", key.strip().lower())


def match(name: str, *, memory_gib: float = 0.0, sm_count: int = 0) -> GPU | None:
    """The board that a device's own name, memory and SM count point to; None when unsure.

    A MIG slice gives a board of its own (key ``a100-mig-1g.10gb``) with the slice's share of memory,
    bandwidth and cache. A laptop part never matches the desktop board of the same number.
    """
    mig = _MIG.search(name)
    whole = _MIG.sub("", name)
    found = [board for board in table() if re.search(board.name_pattern, whole)]
    if sm_count and not mig:
        found = [b for b in found if b.sm_count in (None, sm_count)]
    if memory_gib and not mig and len(found) > 1:
        found.sort(key=lambda b: abs((b.memory_gib or 0.0) - memory_gib))
    if not found:
        return None
    if mig is None:
        return found[0]
    return _slice(found[0], int(mig["slices"]), float(mig["memory"]), sm_count)


def _slice(board: GPU, slices: int, memory_gib: float, sm_count: int) -> GPU:
    """The part of a board that a MIG profile gives; a whole board has seven compute slices."""
    memory_share = min(1.0, memory_gib / (board.memory_gib or memory_gib))
    sms = sm_count or int((board.sm_count or 0) * slices / 7) or None
    compute_share = sms / board.sm_count if sms and board.sm_count else slices / 7
    by_share = {
        "memory_gbps": memory_share,
        "l2_mib": memory_share,
        "fp32_tflops": compute_share,
        "fp16_tensor_tflops": compute_share,
        "bf16_tensor_tflops": compute_share,
        "tf32_tensor_tflops": compute_share,
        "fp64_tflops": compute_share,
    }
    scaled: dict[str, Any] = {
        field: _times(getattr(board, field), share) for field, share in by_share.items()
    }
    profile = f"{slices}g.{memory_gib:g}gb"
    return dataclasses.replace(
        board,
        key=f"{board.key}-mig-{profile}",
        name=f"{board.name} MIG {profile}",
        aliases=(),
        sm_count=sms,
        memory_gib=memory_gib,
        tdp_w=None,
        **scaled,
    )


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else round(value * factor, 3)


def from_machine(machine: Machine) -> GPU | None:
    """The board of a machine at hand, with what the device reports in place of the table's numbers.

    None for a CPU and for a board whose rates no table holds (``--gpu-spec`` can say them).
    """
    if not machine.is_cuda:
        return None
    board = match(machine.gpu_name, memory_gib=machine.memory_gib, sm_count=machine.sm_count)
    if board is None:
        known = {b.key: b for b in table()}
        board = known.get(machine.gpu_key)
    if board is None:
        return None
    reported: dict[str, Any] = {
        "compute_capability": machine.compute_capability,
        "sm_count": machine.sm_count,
        "memory_gib": machine.memory_gib,
        "l2_mib": machine.l2_bytes / 2**20,
        "smem_per_block_optin_kib": machine.smem_per_block_kib,
    }
    return dataclasses.replace(board, **{k: v for k, v in reported.items() if v})


def load_spec(path: str | os.PathLike[str]) -> GPU:
    """A board described in a YAML file: the fields of `GPU`, and ``like: KEY`` to start from a known one.

    ::

        key: a100-64
        name: A100 custom 64GB
        like: a100
        sm_count: 124
        memory_gib: 64

    Raises:
        ConfigError: the file is missing or not YAML, has a key that is no field, a number that is none
            or not positive, or lacks what a prediction needs.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"the GPU description {path} must hold 'field: value' lines")
    base = data.pop("like", None)
    fields = [f.name for f in dataclasses.fields(GPU)]
    if unknown := sorted(str(key) for key in data if key not in fields):
        raise ConfigError(
            f"{path}: unknown {', '.join(unknown)}; a GPU description may hold: like, {', '.join(fields)}"
        )
    values: dict[str, Any] = {}
    for name, value in data.items():
        values[name] = _checked(path, name, value)
    if base is not None:
        values = {f: getattr(resolve(str(base)), f) for f in fields} | {"aliases": ()} | values
    values.setdefault("name", values.get("key", ""))
    if missing := [f for f in ("key", "compute_capability", *_NEEDED) if not values.get(f)]:
        raise ConfigError(f"{path}: {', '.join(missing)} missing; a prediction needs them, or 'like: KEY'")
    return GPU(**values)


_NEEDED = ("sm_count", "boost_mhz", "memory_gib", "memory_gbps", "fp32_tflops")


def _checked(path: str | os.PathLike[str], name: str, value: Any) -> Any:
    if name == "aliases":
        return tuple(map(str, value)) if isinstance(value, list) else (str(value),)
    if name in _TEXTS:
        text = one_line(str(value))
        if name in _SHAPES and not _SHAPES[name].fullmatch(text):
            raise ConfigError(f"{path}: {name} must be {_SHAPED[name]}, not {text[:60]!r}")
        return text
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
        raise ConfigError(f"{path}: {name} must be a number above 0, not {value!r:.60}")
    return int(value) if name in _INTEGERS else float(value)


def why_not_dtype(board: GPU, dtype: str) -> str:
    """Why a board cannot compute in a dtype, in one sentence; empty when it can."""
    if dtype != "bfloat16" or board.capability == (0, 0) or board.capability >= (8, 0):
        return ""
    sm = "sm_" + board.compute_capability.replace(".", "")
    return (
        f"{board.name} ({sm}) has no bfloat16 arithmetic, which starts with sm_80; "
        "float16 or float32 would work"
    )


def check_dtype(board: GPU, dtype: str) -> None:
    """Refuse a dtype that a board cannot compute in.

    Raises:
        UsageError: with the reason of `why_not_dtype`.
    """
    if reason := why_not_dtype(board, dtype):
        raise UsageError(reason)


def slug(name: str) -> str:
    """A short key made from the name of a board that the table does not have."""
    text = re.sub(r"^(nvidia|amd)\s+", "", name.strip().lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "gpu"
