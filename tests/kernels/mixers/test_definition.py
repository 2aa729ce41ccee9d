"""Every mixer agrees with its definition, in what it gives and in its gradients, on maps of any size."""

from __future__ import annotations

import pytest
import torch
from golden_models import apart
from torch import nn

from bratune.kernels.mixers import registry
from bratune.kernels.mixers.definition import bilinear
from bratune.kernels.mixers.mixer import Place

# On max|a - b| / max|b|, in float64.
TOLERANCE = 1e-12


@pytest.mark.parametrize("size", [(14, 14), (15, 17), (9, 23)])
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("name", [*registry.MIXERS, "bi-level-routing:gather"])
def test_a_mixer_computes_its_definition(name: str, stage: int, size: tuple[int, int]) -> None:
    kind = registry.get(name)
    for block in (0, 1):
        where = Place(
            height=size[0], width=size[1], dim=48, heads=4 if stage < 4 else 8, stage=stage, block=block
        )
        assert kind.why_not(where) == ()
        torch.manual_seed(stage)
        module = kind.make(where).double()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        definition = kind.definition(module)
        x = torch.randn(2, *size, 48, dtype=torch.float64, requires_grad=True)
        at = torch.randperm(size[0] * size[1])[:20]
        found, expected = module(x).flatten(1, 2)[:, at], definition(x, at)
        assert apart(found, expected) <= TOLERANCE
        up = torch.randn_like(found)
        mine = torch.autograd.grad(found, [x, *module.parameters()], up, allow_unused=True)
        true = torch.autograd.grad(expected, [x, *definition.parameters()], up, allow_unused=True)
        largest = max(float(b.abs().max()) for b in true if b is not None)
        for a, b in zip(mine, true, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:  # some are zero but for rounding
                assert float((a - b).abs().max()) <= 1e-11 * max(float(b.abs().max()), 1e-2 * largest)


def test_reading_between_tokens_is_bilinear_interpolation_with_zeros_outside() -> None:
    maps = torch.arange(6, dtype=torch.float64).reshape(1, 1, 2, 3)
    points = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [-0.5, -1.0], [3.0, 0.0]]).double()[None]
    assert bilinear(maps, points).flatten().tolist() == [0.0, 5.0, 2.5, 0.5, 0.0]
