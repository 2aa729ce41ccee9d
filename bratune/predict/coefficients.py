"""Coefficients: how much of a specification a kernel reaches, and what a launch costs.

The defaults are read off public measurements of other people's kernels and say so (``uncalibrated``);
`bratune.predict.fit` replaces them by what stored records show.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from bratune.errors import UsageError

__all__ = ["HOSTS", "UNCALIBRATED", "Coefficients", "host_us_of"]

# Standard deviation of log(measured / modelled) that an uncalibrated model is believed to have: 95 % of
# times within a factor of 3.
UNCALIBRATED_SPREAD = math.log(3) / 1.96
# The same for calibrated coefficients that are carried to a board on which nothing was measured, as long as
# no second board's records say what that costs: 95 % within a factor of 1.6, on top of the fit's own spread.
TRANSFER_SPREAD = math.log(1.6) / 1.96


# Host microseconds per operation of eager PyTorch. Public measurements: 10 to 20 on current hosts, 8 where
# nothing else runs; a published BiFormer-S took 59 per kernel. ``bratune doctor`` measures its own.
HOSTS = {"fast": 8.0, "typical": 15.0, "slow": 60.0}


def host_us_of(text: str) -> float:
    """The microseconds of ``--host``: a name of `HOSTS`, or a number.

    Raises:
        UsageError: it is neither.
    """
    if text in HOSTS:
        return HOSTS[text]
    try:
        us = float(text.removesuffix("us"))
    except ValueError:
        us = 0.0
    if not 0 < us < 1e4:
        raise UsageError(
            f"--host {text} is neither one of {', '.join(HOSTS)} nor microseconds per operation, e.g. 12"
        )
    return us


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """Numbers between a specification and a time.

    Attributes:
        memory: Reached fraction of the nominal memory bandwidth.
        cache: Reached fraction of the last-level cache's bandwidth.
        compute: Reached fraction of the dense matrix peak; small batched products reach far less than the
            80 % of a large one.
        cores: Reached fraction of the general cores' issue rate.
        host_us: Host time of one launched operation in eager PyTorch.
        compiled_host_us: The same for a kernel of a compiled graph.
        gap_us: Device time between two kernels when the host keeps ahead.
        graph_gap_us: The same inside a CUDA graph.
        kernel_us: Shortest time of a kernel on the device.
        factors: Measured over modelled device time, by backend (or part, where no backend computes it).
        spreads: Standard deviation of its logarithm, by the same names.
        host_fitted: Whether `host_us` comes from records, or was given; else it may be any of `HOSTS`.
        sources: Keys of the GPUs whose records were used.
        records: How many records were used.
        transfer: Standard deviation that carrying to another board adds, in log.
    """

    memory: float = 0.80
    cache: float = 0.80
    compute: float = 0.50
    cores: float = 0.60
    host_us: float = HOSTS["typical"]
    compiled_host_us: float = 4.0
    gap_us: float = 1.6
    graph_gap_us: float = 1.2
    kernel_us: float = 2.0
    factors: Mapping[str, float] = field(default_factory=dict)
    spreads: Mapping[str, float] = field(default_factory=dict)
    host_fitted: bool = False
    sources: tuple[str, ...] = ()
    records: int = 0
    transfer: float = TRANSFER_SPREAD

    def on_host(self, text: str | None) -> Coefficients:
        """These coefficients for a host that was described, see `host_us_of`; a typical one stays unknown.

        Without a text they stay what they are.

        Raises:
            UsageError: the text describes none.
        """
        if not text:
            return self
        return dataclasses.replace(self, host_us=host_us_of(text), host_fitted=text != "typical")

    def factor(self, name: str) -> float:
        """Measured over modelled device time of a backend or part; 1 where nothing was fitted."""
        return self.factors.get(name, self.factors.get("", 1.0))

    def spread(self, name: str, gpu_key: str) -> float:
        """Standard deviation of log(measured / modelled) to expect on a board."""
        if name not in self.spreads:
            return UNCALIBRATED_SPREAD
        own = self.spreads[name]
        return own if gpu_key in self.sources else math.hypot(own, self.transfer)

    def describe(self, name: str, gpu_key: str) -> str:
        """Where the coefficients of a backend or part come from, in words."""
        if name not in self.spreads:
            return "uncalibrated: no measured record of it"
        where = ", ".join(self.sources)
        if gpu_key in self.sources:
            return f"fitted on {self.records} records of {where}"
        return f"fitted on {self.records} records of {where}, carried over by specifications"


UNCALIBRATED = Coefficients()
