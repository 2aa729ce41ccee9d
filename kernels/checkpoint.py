"""Weights files: the official checkpoints and those of the dense-task frameworks, read safely.

By default nothing in a file is executed: only tensors and plain values are read. What official training
checkpoints hold beside the weights, the arguments of their run (``argparse.Namespace`` or OmegaConf) and
numbers of NumPy, is read into objects that hold nothing. A whole model (``torch.save(model)``, or the
``model`` and ``ema`` of YOLO trainers) is code and data of its author, and needs the caller's consent.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bratune.errors import CheckpointError, UnknownNameError

__all__ = [
    "TRUST_VARIABLE",
    "Loaded",
    "classes_of",
    "convert_stl",
    "is_trusted",
    "load_weights",
    "read_weights",
]

# Set to 1, weights files may run code of their own in this process and in those that it starts.
TRUST_VARIABLE = "BRATUNE_TRUST_CHECKPOINT"

# Where frameworks put the weights, most telling first; a bare state dict has none of these.
_WRAPPERS = ("model", "state_dict")
_AVERAGED = ("model_ema", "ema")
_PREFIXES = ("module.", "backbone.", "_orig_mod.")
# Of these a backbone has its own (extra_norms) and a classifier its own (norm, head): between the
# two, they are expected to differ.
_CLASSIFIER_ONLY = ("norm.", "head.")
_BACKBONE_ONLY = ("extra_norms.",)


# Plain values that training code keeps beside weights. They are read into `_Value`, which does nothing.
_VALUES = re.compile(
    r"argparse\.Namespace|omegaconf\.[\w.]+|typing\.\w+|pathlib\.(_local\.)?\w*Path|collections\.defaultdict|"
    r"numpy\.(_?core\.multiarray\.scalar|dtype|dtypes\.\w+)|builtins\.(dict|list|tuple|int|float|str|bool|bytes)|"
    r"datetime\.(datetime|date|timedelta|timezone)|__builtin__\.(dict|list|tuple|int|float|str|bool|bytes)"
)
# What no weights file needs: advice to trust a file that asks for it would be bad advice.
_NEVER = re.compile(
    r"(os|posix|nt|sys|subprocess|shutil|socket|importlib|runpy|ctypes|webbrowser|pty)\b.*|"
    r"(builtins|__builtin__)\.(eval|exec|compile|open|__import__|breakpoint|input)"
)


class _Value:
    """Stands for an object that nothing is wanted of."""

    def __new__(cls, *_: Any, **__: Any) -> _Value:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` did.

    Attributes:
        path: The file.
        kept: Parameters of the model that the file does not have, so that they keep their values.
        ignored: Entries of the file that the model does not have.
    """

    path: Path
    kept: tuple[str, ...]
    ignored: tuple[str, ...]


def read_weights(path: str | Path, *, trust: bool = False, ema: bool = False) -> dict[str, Tensor]:
    """The weights in a file by name, whatever they are wrapped in.

    Understood are ``{"model": ...}`` (official training), ``{"state_dict": ...}`` (detection and segmentation
    frameworks), a bare dictionary and, with ``trust``, a whole model in the place of each; the prefixes
    ``module.`` and ``backbone.`` are taken off.

    Args:
        path: A file written by ``torch.save``.
        trust: Read whatever objects the file holds, which may run code of the file's author. Also on where
            the environment sets `TRUST_VARIABLE` to 1.
        ema: Take the averaged weights (``model_ema`` or ``ema``) in the place of the trained ones.

    Raises:
        CheckpointError: the file cannot be read, needs trust, or holds no weights.
    """
    path = Path(path)
    content = _by_name(_read(path, trust=trust or is_trusted()))
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not weights by name")
    # YOLO trainers leave `model` empty once training is done: the averaged weights are the answer then.
    wrappers = _AVERAGED if ema else (*_WRAPPERS, *_AVERAGED)
    inside = (_by_name(content.get(wrapper)) for wrapper in wrappers)
    found = next((weights for weights in inside if isinstance(weights, Mapping)), None)
    if found is None and ema:
        names = " or ".join(_AVERAGED)
        raise CheckpointError(f"{path} holds no averaged weights ({names}), only {_some(content)}")
    content = content if found is None else found
    weights = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise CheckpointError(f"{path} holds no weights, only {_some(content)}")
    return _without_prefixes(weights)


def is_trusted() -> bool:
    """Whether the environment lets weights files run code; see `TRUST_VARIABLE`."""
    return os.environ.get(TRUST_VARIABLE) == "1"


def _by_name(content: Any) -> Any:
    """Weights by name, where something is a whole model; anything else as it is."""
    return content.state_dict() if isinstance(content, nn.Module) else content


def classes_of(path: str | Path, *, trust: bool = False) -> int | None:
    """How many classes the weights of a file tell apart; None where they have no head.

    Raises:
        CheckpointError: see `read_weights`.
    """
    head = read_weights(path, trust=trust).get("head.weight")
    return None if head is None else int(head.shape[0])


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    trust: bool = False,
    ema: bool = False,
    skip_head: bool = False,
) -> Loaded:
    """Give a model the weights of a file.

    A ``features_only`` model takes those of a classifier: it keeps its own ``extra_norms`` and leaves the
    classifier's ``norm`` and ``head``. Every other difference is an error.

    Args:
        model: The model.
        path: See `read_weights`.
        trust: See `read_weights`.
        ema: See `read_weights`.
        skip_head: Keep the model's own ``head``, to train it for other classes.

    Raises:
        CheckpointError: the file cannot be read or does not fit; parameters are named.
    """
    path = Path(path)
    weights = read_weights(path, trust=trust, ema=ema)
    own = model.state_dict()
    backbone = bool(getattr(model, "features_only", False))
    if skip_head:
        weights = {name: value for name, value in weights.items() if not name.startswith("head.")}
    missing = tuple(name for name in own if name not in weights)
    unexpected = tuple(name for name in weights if name not in own)
    may_miss = (*(_BACKBONE_ONLY if backbone else ()), *(("head.",) if skip_head else ()))
    may_have = _CLASSIFIER_ONLY if backbone else ()
    problems = _differences(
        [name for name in missing if not name.startswith(may_miss)] if may_miss else missing,
        [name for name in unexpected if not name.startswith(may_have)] if may_have else unexpected,
        _reshaped(weights, own),
    )
    if problems:
        raise CheckpointError(f"{path} does not fit the model: {problems}")
    model.load_state_dict({name: value for name, value in weights.items() if name in own}, strict=False)
    return Loaded(path=path, kept=missing, ignored=unexpected)


def convert_stl(weights: Mapping[str, Tensor], to: str) -> dict[str, Tensor]:
    """Weights of ``biformer_stl`` under the names and shapes of ``biformer_stl_nchw``, or the reverse.

    Stages 1 to 3 compute the same afterwards, where S divides the maps. Stage 4 does not: the NHWC model
    enhances the *input* of full attention, the NCHW model the *values*. A warning says so.

    Args:
        weights: A state dict of one of both.
        to: ``nchw`` or ``nhwc``, the layout to convert to.

    Raises:
        UnknownNameError: another layout.
    """
    if to not in ("nchw", "nhwc"):
        raise UnknownNameError("layout", to, ("nchw", "nhwc"))
    warnings.warn(
        "stage 4 of the NHWC and the NCHW model are different functions (local enhancement of the input "
        "and of the values): converted weights need fine-tuning",
        stacklevel=2,
    )
    renames = {".attn.qkv.qkv.": ".attn.qkv_linear.", ".attn.wo.": ".attn.output_linear."}
    converted = {}
    for name, value in weights.items():
        for nhwc, nchw in renames.items():
            name = name.replace(nhwc, nchw) if to == "nchw" else name.replace(nchw, nhwc)
        projects = any(f".{part}." in name for part in ("attn", "mlp")) and not name.endswith("lepe.weight")
        if projects and name.endswith(".weight"):
            value = value[:, :, None, None] if to == "nchw" else value.flatten(1)
        converted[name] = value
    return converted


def _read(path: Path, *, trust: bool) -> Any:
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "is not a file here"
        raise CheckpointError(f"weights {path} cannot be read: it {found}")
    needs = _foreign_objects(path)
    values: list[Any] = [(_Value, name) for name in needs if _VALUES.fullmatch(name)]
    try:
        with torch.serialization.safe_globals([] if trust else values):
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        code = tuple(name for name in needs if not _VALUES.fullmatch(name))
        if trust:
            raise CheckpointError(f"{path} {_state(path)}: {_first_line(error)}") from None
        if not needs:
            # torch's own text speaks of weights_only=False, which would not help here.
            raise CheckpointError(f"{path} {_state(path)}; a file written by torch.save would work") from None
        raise CheckpointError(f"{path} holds more than weights: {_advice(code or needs)}") from None
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{path} holds objects of the package {error.name}, which is not installed; "
            f"pip install {error.name} would help"
        ) from None
    except Exception as error:  # bytes that are no weights make the reader raise anything
        raise CheckpointError(f"{path} {_state(path)}: {_first_line(error)}") from None


def _advice(needs: tuple[str, ...]) -> str:
    """What would help with a file that holds objects of these classes and functions."""
    text = f"it needs {_listed(needs)}, and reading these runs code"
    instead = "a file of torch.save(model.state_dict()) would work"
    if bad := [name for name in needs if _NEVER.fullmatch(name)]:
        return f"{text}; no weights need {_listed(bad)}, so do not trust this file; {instead}"
    if missing := sorted({name.partition(".")[0] for name in needs if not _is_here(name)}):
        return (
            f"{text}; {_listed(missing)} cannot be imported here, so that trusting the file would not help "
            f"either; {instead}"
        )
    return (
        f"{text}; if you trust where the file comes from, trust_checkpoint=True (command line: "
        f"--trust-checkpoint) reads it, and {instead} without"
    )


def _is_here(name: str) -> bool:
    """Whether the package of a class can be found, without importing it."""
    try:
        return importlib.util.find_spec(name.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _foreign_objects(path: Path) -> tuple[str, ...]:
    """Names of the classes and functions that a file would import, beyond what tensors need."""
    try:
        return tuple(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    except Exception:  # an unreadable file: the caller says so
        return ()


def _state(path: Path) -> str:
    """What is wrong with an unreadable file: archives begin like what torch.save writes."""
    with path.open("rb") as file:
        return "is cut short or damaged" if file.read(2) == b"PK" else "is not a weights file"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _some(content: Mapping[Any, Any], limit: int = 6) -> str:
    return _listed([str(key) for key in content], limit) or "nothing"


def _listed(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _without_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes that wrappers put before them; of a detector, the backbone alone."""
    while True:
        for prefix in _PREFIXES:
            inside = {
                name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)
            }
            if inside and (prefix == "backbone." or len(inside) == len(weights)):
                weights = inside
                break
        else:
            return weights


def _reshaped(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """A sentence for every parameter whose shape differs."""
    return [
        f"{name} is {list(value.shape)} in the file and {list(own[name].shape)} in the model"
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    ]


def _differences(missing: Iterable[str], unexpected: Iterable[str], reshaped: list[str]) -> str:
    parts = []
    if missing := list(missing):
        parts.append(f"{len(missing)} missing ({_listed(missing)})")
    if unexpected := list(unexpected):
        parts.append(f"{len(unexpected)} unexpected ({_listed(unexpected)})")
    if reshaped:
        parts.append(
            "; ".join(reshaped[:3]) + (f" and {len(reshaped) - 3} more" if len(reshaped) > 3 else "")
        )
        if all(text.startswith("head.") for text in reshaped):
            parts.append(
                "the file was trained for another number of classes: build the model with num_classes as in "
                "the file, or keep the model's own head with skip_head=True"
            )
    return "; ".join(parts)
