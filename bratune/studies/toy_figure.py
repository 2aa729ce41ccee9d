"""Toy figure: divergence against loss of top-1, one colour per checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from bratune.errors import MissingPackageError
from bratune.tune.calibration import Calibration

__all__ = ["study_figure"]


def study_figure(found: Mapping[str, Calibration]) -> str:
    """The figure as JSON for plotly.

    Raises:
        MissingPackageError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise MissingPackageError("plotly", "the figure of the study") from None
    figure = go.Figure()
    for name, calibration in found.items():
        low, high = calibration.rho_interval
        figure.add_scatter(
            x=[max(p.divergence, 1e-6) for p in calibration.points],
            y=[100 * p.drop for p in calibration.points],
            text=[p.setting for p in calibration.points],
            mode="markers",
            name=f"trained {name}: Spearman {calibration.rho:.2f} [{low:.2f}, {high:.2f}]",
        )
    figure.update_layout(
        title="Does the divergence from the trained setting rank settings by lost accuracy?",
        xaxis={"title": "KL divergence from the trained setting, nats", "type": "log"},
        yaxis={"title": "loss of top-1, points"},
    )
    return str(figure.to_json())
