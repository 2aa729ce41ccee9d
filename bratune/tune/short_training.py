"""Short training: a classifier on labelled pictures for some minutes, and what two of them differ by.

In a shared run, S and top-k are drawn anew at every step. S and top-k own no parameters, so that one set of
weights can be trained for all settings at once and then be validated with each. It ranks settings for
training from scratch about as well as one short training of every setting, at the cost of one; differences
within two standard errors are no differences.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bratune.errors import UsageError
from bratune.kernels.backbone import Backbone
from bratune.kernels.biformer import build
from bratune.tune import evidence
from bratune.tune.checkpoint_fidelity import BACKEND, outputs, reroute
from bratune.tune.fidelity_source import Fidelity
from bratune.tune.ledger import derived_seed
from bratune.tune.lost_accuracy import ALLOWED_LOSS
from bratune.tune.pictures import Pictures, load_pictures
from bratune.tune.request import TuneRequest
from bratune.tune.setting import Setting
from bratune.tune.show import Say
from bratune.tune.space import Space

__all__ = [
    "Recipe",
    "SharedRun",
    "TrainedSource",
    "draw",
    "fresh_model",
    "labelled_halves",
    "paired_gain",
    "recipe_of",
    "renorm",
    "train_shared",
]

# Validation pictures below which no difference between settings could be seen.
FEWEST = 20
# A loss of accuracy, as a fraction, that a setting may have and be called not worse.
NOT_WORSE = ALLOWED_LOSS["balanced"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a short training goes.

    Attributes:
        steps: Of every seed.
        seeds: Trainings that differ in nothing else; two are the fewest that give a standard error.
        most_seeds: Where these do not decide, pairs are added up to so many; the same study goes on with
            another number.
        norm_batches: Batches on which a shared run takes running statistics anew for every setting.
    """

    steps: int = 300
    batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    seeds: int = 2
    most_seeds: int = field(default=0, repr=False)
    norm_batches: int = 8


class TrainedSource:
    """What fidelity sources that train have in common.

    Their loss is how far validation accuracy falls below the reference's by more than two standard errors, as
    a fraction; so settings that cannot be told apart share the loss 0.
    """

    space: Space
    reference: Setting

    def joint(self, setting: Setting) -> Fidelity:
        """The loss and the evidence of a whole setting."""
        raise NotImplementedError

    @property
    def limits(self) -> dict[str, float]:
        """Indistinguishable from the reference, by every rule."""
        return dict.fromkeys(("safe", "balanced", "fast"), 0.0)

    def stage_loss(self, index: int, n_win: int, topk: int) -> float:
        """The loss of the reference with only one stage changed."""
        sides, topks = list(self.reference.n_win), list(self.reference.topks)
        sides[index], topks[index] = n_win, topk
        return self.joint(self.space.setting(sides, topks)).loss


def recipe_of(request: TuneRequest) -> Recipe:
    """The recipe that a request asks for."""
    return Recipe(steps=request.train_steps, seeds=request.train_seeds, most_seeds=request.train_most_seeds)


def labelled_halves(request: TuneRequest) -> tuple[Pictures, Pictures]:
    """The request's pictures: four fifths to train on, one fifth to validate on.

    Raises:
        UsageError: there are too few.
    """
    size = request.height, request.width
    whole = load_pictures(request.images, *size, count=10**9, labels=True, seed=request.seed)
    if len(whole) < 5 * FEWEST:
        raise UsageError(
            f"{request.images} holds {len(whole)} labelled pictures; short trainings need at least "
            f"{5 * FEWEST}, of which a fifth says how good a setting is"
        )
    assert whole.labels is not None
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(request.seed))
    cut = len(whole) * 4 // 5
    train, valid = (
        dataclasses.replace(whole, images=whole.images[rows], labels=whole.labels[rows])
        for rows in (order[:cut], order[cut:])
    )
    return train, valid


def fresh_model(space: Space, classes: int, *, device: str, seed: int) -> Backbone:
    """A model with new weights that takes any S and any map."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"auto_pad": True} if space.variant.layout == "biformer" else {}
    return build(space.model, num_classes=classes, backend=BACKEND, **options).to(device)


def train_shared(
    model: Backbone,
    images: Tensor,
    labels: Tensor,
    choose: Callable[[], Setting],
    recipe: Recipe,
    *,
    seed: int = 0,
    augment: Callable[[Tensor, torch.Generator], Tensor] = lambda images, generator: images,
    after_step: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Train a classifier, every step with the setting that ``choose`` returns; returns the loss of each step.

    Args:
        model: On the device to use.
        images: ``[N, 3, H, W]``.
        labels: ``[N]`` int64.
        choose: Called once per step; always the same setting makes it an ordinary training.
        recipe: How.
        seed: Of the order of the images.
        augment: Changes the images of a step before they are used.
        after_step: Called with the number of steps done; may use the model, and ends the training by raising.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    model.train()
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(recipe.steps):
        if len(order) < min(recipe.batch, len(images)):
            order = torch.randperm(len(images), generator=generator)
        rows, order = order[: recipe.batch], order[recipe.batch :]
        setting = choose()
        reroute(model, setting.n_win, setting.topks)
        logits = model(augment(images[rows], generator).to(device))
        loss = nn.functional.cross_entropy(logits, labels[rows].to(device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        after_step(len(losses))
        if not model.training:
            model.train()
    return losses


def decides(gain: float, error: float) -> bool:
    """Whether a gain is surely a loss, or surely not a loss of more than `NOT_WORSE`."""
    return gain + 2 * error < 0 or gain - 2 * error >= -NOT_WORSE


def paired_gain(own: Sequence[Tensor], reference: Sequence[Tensor]) -> tuple[float, float]:
    """How much more of the same pictures is classified correctly, as a fraction, and its standard error.

    The error holds both what seeds differ by and what pictures differ by within a seed.

    Args:
        own: Per seed, whether each picture is classified correctly, ``[N]`` bool.
        reference: The same of the reference, from the same seeds and pictures.
    """
    pairs = [(a.double() - b.double()) for a, b in zip(own, reference, strict=True)]
    gains = [float(pair.mean()) for pair in pairs]
    count, mean = len(gains), sum(gains) / len(gains)
    between = sum((g - mean) ** 2 for g in gains) / max(count - 1, 1) / count
    within = sum(float(pair.var()) / len(pair) for pair in pairs) / count / count
    return mean, (between + within) ** 0.5


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
        cls, request: TuneRequest, *, device: str, recipe: Recipe | None = None, say: Say = lambda text: None
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
