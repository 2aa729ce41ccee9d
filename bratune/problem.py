"""Problem: one routed-attention call in numbers.

A problem holds no tensors and imports no torch: it hashes, sorts and serialises, names a cell in a
record and tells a backend everything that it needs to know beside the tensors.

Words: the *map* is the grid of tokens, ``height x width``. A *region* is a tile of ``region = (rh, rw)``
tokens; the grid of regions is ``ceil(height / rh) x ceil(width / rw)``, numbered row by row. Every
query region attends to ``topk`` key regions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bratune.errors import ProblemError

__all__ = [
    "DIRECTIONS",
    "DTYPES",
    "PADDINGS",
    "Problem",
    "ceil_div",
    "factors_that_tile",
    "split_map",
]

DTYPES = ("float16", "bfloat16", "float32", "float64")
DIRECTIONS = ("fwd", "fwd-bwd")
PADDINGS = ("zeros", "masked")

# Of images, heads, tokens on a side and so on: beyond it a number is a mistake, and products overflow.
_LARGEST = 2**31 - 1
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def ceil_div(a: int, b: int) -> int:
    """The smallest integer that is at least ``a / b``."""
    return -(-a // b)


def factors_that_tile(height: int, width: int) -> tuple[int, ...]:
    """Region factors S for which ``S x S`` equal regions tile a ``height x width`` map exactly."""
    return tuple(s for s in range(1, min(height, width) + 1) if height % s == 0 and width % s == 0)


def split_map(height: int, width: int, n_win: int, *, pad: bool = False) -> tuple[int, int]:
    """The region ``(rh, rw)`` that cuts a map into ``n_win x n_win`` regions.

    Args:
        height: Tokens from top to bottom.
        width: Tokens from left to right.
        n_win: Regions per side, S.
        pad: Round regions up, so that they cover a map that S does not divide (the official
            ``auto_pad``); the map is then padded at the bottom and on the right.

    Raises:
        ProblemError: S does not divide the map and ``pad`` is off.
    """
    if n_win < 1:
        raise ProblemError(f"regions per side must be at least 1, not {n_win}")
    if not pad and (height % n_win or width % n_win):
        tiling = ", ".join(map(str, factors_that_tile(height, width)))
        raise ProblemError(f"{n_win} regions per side do not tile a {height}x{width} map; these do: {tiling}")
    return ceil_div(height, n_win), ceil_div(width, n_win)


@dataclass(frozen=True, order=True, kw_only=True)
class Problem:
    """One call of routed attention, validated when it is made.

    Args:
        batch: Images.
        height: Query tokens from top to bottom, before padding.
        width: Query tokens from left to right, before padding.
        heads: Attention heads.
        head_dim: Channels of a head in q and k.
        region: Query region ``(rh, rw)`` in tokens.
        topk: Key regions that every query region attends to (with multiplicity).
        dtype: ``float16``, ``bfloat16``, ``float32`` or ``float64``.
        direction: ``fwd`` or ``fwd-bwd``; a backend that cannot differentiate refuses the second.
        padding: What a map that regions do not divide is filled with: ``zeros`` are keys like any
            other (logit 0, value 0; the official behaviour), ``masked`` keys get no weight.
        kv_height: Key tokens from top to bottom; by default the query's.
        kv_width: Key tokens from left to right; by default the query's.
        kv_region: Key region in tokens; by default the query's.
        v_head_dim: Channels of a head in v; by default ``head_dim``.
        per_head: Every head has routes of its own.
        scale: Factor of the logits; by default ``(heads * head_dim) ** -0.5``, the official choice.

    Raises:
        ProblemError: the numbers contradict each other.
    """

    batch: int
    height: int
    width: int
    heads: int
    head_dim: int
    region: tuple[int, int]
    topk: int
    dtype: str = "float32"
    direction: str = "fwd"
    padding: str = "zeros"
    kv_height: int = 0
    kv_width: int = 0
    kv_region: tuple[int, int] = (0, 0)
    v_head_dim: int = 0
    per_head: bool = False
    scale: float = 0.0

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("batch", "height", "width", "heads", "head_dim", "topk"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ProblemError(f"{name} must be a whole number of at least 1, not {value!r}")
            if value > _LARGEST:
                raise ProblemError(f"{name} must be at most {_LARGEST}, not {value!r:.40}")
        put(self, "kv_height", self.kv_height or self.height)
        put(self, "kv_width", self.kv_width or self.width)
        put(self, "region", self._checked_region(self.region, "region"))
        kv_region = self.kv_region if any(self.kv_region) else self.region
        put(self, "kv_region", self._checked_region(kv_region, "kv_region"))
        put(self, "v_head_dim", self.v_head_dim or self.head_dim)
        put(self, "scale", float(self.scale) or self.channels**-0.5)
        for name, known in (("dtype", DTYPES), ("direction", DIRECTIONS), ("padding", PADDINGS)):
            if getattr(self, name) not in known:
                raise ProblemError(
                    f"{name} {getattr(self, name)!r} is not known; these are: {', '.join(known)}"
                )
        others = self.kv_height, self.kv_width, self.v_head_dim
        if min(others) < 1 or max(others) > _LARGEST:
            raise ProblemError(f"kv_height, kv_width and v_head_dim must be at least 1, and up to {_LARGEST}")
        if self.topk > self.kv_regions:
            rows, cols = self.kv_grid
            raise ProblemError(
                f"top-k {self.topk} is more than the {self.kv_regions} key regions "
                f"({rows}x{cols}); 1 to {self.kv_regions} would work"
            )

    @staticmethod
    def _checked_region(region: Any, name: str) -> tuple[int, int]:
        try:
            rh, rw = (int(side) for side in region)
        except (TypeError, ValueError):
            raise ProblemError(f"{name} must be two whole numbers (rh, rw), not {region!r}") from None
        if rh < 1 or rw < 1:
            raise ProblemError(f"{name} must be at least 1x1 tokens, not {rh}x{rw}")
        if max(rh, rw) > _LARGEST:
            raise ProblemError(f"{name} must be at most {_LARGEST} tokens on a side")
        return rh, rw

    # --- sizes ------------------------------------------------------------------------------

    @property
    def channels(self) -> int:
        """Channels of q and k: ``heads * head_dim``."""
        return self.heads * self.head_dim

    @property
    def v_channels(self) -> int:
        """Channels of v and of the output."""
        return self.heads * self.v_head_dim

    @property
    def grid(self) -> tuple[int, int]:
        """Query regions from top to bottom and from left to right."""
        return ceil_div(self.height, self.region[0]), ceil_div(self.width, self.region[1])

    @property
    def kv_grid(self) -> tuple[int, int]:
        """Key regions from top to bottom and from left to right."""
        return ceil_div(self.kv_height, self.kv_region[0]), ceil_div(self.kv_width, self.kv_region[1])

    @property
    def regions(self) -> int:
        """Query regions, R."""
        return self.grid[0] * self.grid[1]

    @property
    def kv_regions(self) -> int:
        """Key regions."""
        return self.kv_grid[0] * self.kv_grid[1]

    @property
    def region_tokens(self) -> int:
        """Tokens of a query region."""
        return self.region[0] * self.region[1]

    @property
    def kv_region_tokens(self) -> int:
        """Tokens of a key region."""
        return self.kv_region[0] * self.kv_region[1]

    @property
    def tokens(self) -> int:
        """Query tokens of one image, before padding."""
        return self.height * self.width

    @property
    def kv_tokens(self) -> int:
        """Key tokens of one image, before padding."""
        return self.kv_height * self.kv_width

    @property
    def padded(self) -> tuple[int, int]:
        """The query map after padding."""
        return self.grid[0] * self.region[0], self.grid[1] * self.region[1]

    @property
    def kv_padded(self) -> tuple[int, int]:
        """The key map after padding."""
        return self.kv_grid[0] * self.kv_region[0], self.kv_grid[1] * self.kv_region[1]

    @property
    def divisible(self) -> bool:
        """Whether regions tile both maps, so that nothing is padded."""
        return self.padded == (self.height, self.width) and self.kv_padded == (
            self.kv_height,
            self.kv_width,
        )

    @property
    def same_regions(self) -> bool:
        """Whether keys have the same map and regions as queries."""
        return self.kv_region == self.region and (self.kv_height, self.kv_width) == (
            self.height,
            self.width,
        )

    @property
    def keys_per_query(self) -> int:
        """Keys that a query attends to, padding included."""
        return self.topk * self.kv_region_tokens

    @property
    def backward(self) -> bool:
        """Whether gradients are asked for."""
        return self.direction == "fwd-bwd"

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return ITEM_BYTES[self.dtype]

    # --- counted work -----------------------------------------------------------------------

    @property
    def attention_macs(self) -> int:
        """Multiply-adds of both products of the forward pass, padded queries and keys included."""
        pairs = self.batch * self.regions * self.region_tokens * self.keys_per_query
        return pairs * (self.channels + self.v_channels)

    @property
    def io_bytes(self) -> int:
        """The fewest bytes a forward pass can move: q, k, v read once, the output written once."""
        q = self.batch * self.tokens * (self.channels + self.v_channels)
        kv = self.batch * self.kv_tokens * (self.channels + self.v_channels)
        return (q + kv) * self.item_bytes

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the keys and values that gather-then-dense copies out."""
        keys = self.batch * self.regions * self.keys_per_query
        return keys * (self.channels + self.v_channels) * self.item_bytes

    @property
    def score_bytes(self) -> int:
        """Bytes of one copy of the score matrix that is written out when nothing is fused."""
        rows = self.batch * self.heads * self.regions * self.region_tokens
        return rows * self.keys_per_query * self.item_bytes

    # --- as text and data -------------------------------------------------------------------

    def replace(self, **changes: Any) -> Problem:
        """A copy with other values; what followed from a changed value must be given too."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        data = dataclasses.asdict(self)
        data["region"], data["kv_region"] = list(self.region), list(self.kv_region)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Problem:
        """The inverse of `to_dict`.

        Raises:
            ProblemError: a field is missing or not known, or its value is none that a call can have.
        """
        try:
            fields = dict(data)
            fields["region"] = tuple(fields["region"])
            fields["kv_region"] = tuple(fields.get("kv_region") or (0, 0))
            return cls(**fields)
        except ProblemError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ProblemError(f"this describes no call: {str(data)[:80]} ({error})") from None

    def __str__(self) -> str:
        rows, cols = self.grid
        text = (
            f"{self.batch}x{self.height}x{self.width} map, {self.heads} heads of {self.head_dim}, "
            f"{rows}x{cols} regions of {self.region[0]}x{self.region[1]}, top-{self.topk}, "
            f"{self.dtype}, {self.direction}"
        )
        if not self.same_regions:
            text += (
                f", keys {self.kv_height}x{self.kv_width} in regions of "
                f"{self.kv_region[0]}x{self.kv_region[1]}"
            )
        if not self.divisible:
            text += f", padding {self.padding}"
        if self.per_head:
            text += ", routes per head"
        return text
