"""Shared run: one short training in which S and top-k are drawn anew at every step.

S and top-k own no parameters, so that one set of weights can be trained for all settings at once and then be
validated with each. It ranks settings for training from scratch about as well as one short training of every
setting, at the cost of one; differences within two standard errors are no differences.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bratune.kernels.backbone import Backbone
from bratune.tune import evidence
from bratune.tune.checkpoint_fidelity import outputs
from bratune.tune.fidelity_source import Fidelity
from bratune.tune.ledger import derived_seed
from bratune.tune.pictures import Pictures
from bratune.tune.progress import Say
from bratune.tune.request import Request
from bratune.tune.rerouting import reroute
from bratune.tune.setting import Setting
from bratune.tune.short_training import (
    Recipe,
    TrainedSource,
    fresh_model,
    labelled_halves,
    paired_gain,
    recipe_of,
    train_shared,
)
from bratune.tune.space import Space

__all__ = ["SharedRun", "draw", "renorm"]


def draw(space: Space, rng: random.Random) -> Setting:
    """A setting for one step: a quarter the largest top-k, a quarter the smallest, half at random."""
    kind = rng.random()
    if space.per_stage:
        sides = {i: rng.choice(space.windows(i)) for i in space.routed}
    else:
        one = rng.choice([w.n_win for w in space.shared_windows()])
        sides = dict.fromkeys(space.routed, one)
    n_win = [space.base_n_win] * len(space.variant.dims)
    topks = list(space.variant.topks)
    for i in space.routed:
        legal = space.topks(i, sides[i])
        n_win[i] = sides[i]
        topks[i] = legal[-1] if kind < 0.25 else legal[0] if kind < 0.5 else rng.choice(legal)
    return space.setting(n_win, topks)


def renorm(model: Backbone, images: Tensor, *, batch: int, batches: int) -> None:
    """Take the running statistics of batch normalisation anew, for the setting that is in place."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [m.momentum for m in norms]
    device = next(model.parameters()).device
    model.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    with torch.no_grad():
        for some in torch.split(images[: batch * batches], batch):
            if len(some) > 1:
                model(some.to(device))
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    model.eval()


class SharedRun(TrainedSource):
    """A `bratune.tune.fidelity_source.FidelitySource` over weights that were trained for all settings.

    Args:
        models: One per seed, trained by `bratune.tune.short_training.train_shared`.
        space: Model and resolution.
        reference: What is compared with.
        train: Pictures that running statistics are taken on.
        valid: Labelled pictures that were not trained on.
        recipe: How the models were trained.
    """

    def __init__(
        self,
        models: Sequence[Backbone],
        space: Space,
        reference: Setting,
        train: Pictures,
        valid: Pictures,
        recipe: Recipe,
    ) -> None:
        self.models, self.space, self.reference = list(models), space, reference
        self.train_pictures, self.valid, self.recipe = train, valid, recipe
        self._seen: dict[str, list[Tensor]] = {}

    @classmethod
    def train(
        cls, request: Request, *, device: str, recipe: Recipe | None = None, say: Say = lambda text: None
    ) -> SharedRun:
        """Train one model per seed on four fifths of the request's pictures."""
        recipe = recipe or recipe_of(request)
        train, valid = labelled_halves(request)
        assert train.labels is not None
        models, space = [], request.space
        for index in range(recipe.seeds):
            seed = derived_seed(request.seed, "shared run", index)
            model = fresh_model(space, len(train.classes), device=device, seed=seed)
            rng = random.Random(seed)
            choose = functools.partial(draw, space, rng)
            losses = train_shared(model, train.images, train.labels, choose, recipe, seed=seed)
            say(f"shared run {index + 1} of {recipe.seeds}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
            models.append(model)
        return cls(models, space, request.reference, train, valid, recipe)

    @property
    def key(self) -> str:
        """Pictures, recipe and reference."""
        text = f"{self.valid.key}-{self.recipe}-{self.space.model_key(self.reference)}"
        return "shared-" + hashlib.sha256(text.encode()).hexdigest()[:12]

    def joint(self, setting: Setting) -> Fidelity:
        """How far validation accuracy falls below the reference's, and the evidence for it."""
        own, reference = self._correct(setting), self._correct(self.reference)
        gain, error = paired_gain(own, reference)
        found = evidence.shared_run(gain=100 * gain, error=100 * error, seeds=len(own))
        return Fidelity(loss=max(0.0, -gain - 2 * error), evidence=found)

    def _correct(self, setting: Setting) -> list[Tensor]:
        key = self.space.model_key(setting)
        if key not in self._seen:
            assert self.valid.labels is not None
            found = []
            for model in self.models:
                reroute(model, setting.n_win, setting.topks)
                recipe = self.recipe
                renorm(model, self.train_pictures.images, batch=recipe.batch, batches=recipe.norm_batches)
                found.append(outputs(model, self.valid.images)[0].argmax(1) == self.valid.labels)
            self._seen[key] = found
        return self._seen[key]
