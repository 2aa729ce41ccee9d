"""Accuracy study: which proxy ranks settings of trained weights, and which statements about accuracy hold.

A small BiFormer is trained on each data set, with each seed, with a setting like the authors' and with a
sparser one. Other settings are tried on those weights without retraining: what the proxies say on some
pictures, and what top-1 loses on many others. One line of a file per trained network, so that a study that
was interrupted goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bratune.errors import StoreError
from bratune.kernels.backbone import Backbone
from bratune.kernels.biformer import build
from bratune.measure.ranks import spearman
from bratune.record import utc_now
from bratune.studies.data_sets import DATA_SETS, SIDE, get_data_set
from bratune.studies.proxies import PROXIES, ROUTING_PICTURES, Observed, proxies_of, routed_regions
from bratune.tune.checkpoint_fidelity import BACKEND, reroute
from bratune.tune.setting import Setting
from bratune.tune.short_training import Recipe, train_shared
from bratune.tune.show import Say
from bratune.tune.space import Space

__all__ = [
    "SMOKE",
    "TRAINED",
    "TRAINING",
    "SettingTrial",
    "Size",
    "TrainedCase",
    "keys_of",
    "rank_of",
    "read_cases",
    "run_case",
    "run_study",
    "small_model",
    "small_space",
    "spread",
    "trial_of",
]

# Settings that weights are trained with: S = 4 in every stage (16 regions).
TRAINED = {"reference": (1, 4, 8, -2), "sparse": (1, 1, 2, -2)}

TRAINING = Recipe(steps=320, batch=48, learning_rate=2e-3)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of the study.

    Attributes:
        train: Pictures to train on.
        proxy: Pictures of the proxies.
        test: Other pictures, that the loss of top-1 is measured on.
        settings: Settings tried per network.
        recipe: How networks are trained.
    """

    train: int = 2048
    proxy: int = 500
    test: int = 2000
    settings: int = 14
    recipe: Recipe = TRAINING


# Seconds, and too little training to prove anything.
SMOKE = Size(train=48, proxy=32, test=32, settings=4, recipe=Recipe(steps=2, batch=16))


@dataclass(frozen=True, kw_only=True)
class SettingTrial:
    """One setting on weights that were trained with another.

    Attributes:
        setting: In words.
        keys: Keys per query of the routed stages, added up: what the setting costs.
        proxies: By name, see `PROXIES`; on the proxy's pictures.
        lost: Of those pictures, how many became wrong.
        gained: Of those, how many became right.
        differ: Of those, how many have another top class.
        test_lost: Of the test pictures, how many became wrong.
        test_gained: Of those, how many became right.
        test_loss: Of mIoU on the test pictures, where that is what is lost.
    """

    setting: str
    keys: int
    proxies: dict[str, float]
    lost: int
    gained: int
    differ: int
    test_lost: int
    test_gained: int
    test_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedCase:
    """One trained network and every setting that was tried on it; ``top1`` is what ``measure`` names."""

    data: str
    seed: int
    trained: str
    top1: float
    images: int
    test_images: int
    trials: tuple[SettingTrial, ...] = field(repr=False)
    created_utc: str = ""
    measure: str = "top-1"

    @property
    def key(self) -> tuple[str, int, str]:
        """What names a case within a study."""
        return self.data, self.seed, self.trained

    def drop(self, trial: SettingTrial) -> float:
        """Loss of top-1, or of mIoU, on the test pictures, as a fraction."""
        if trial.test_loss is not None:
            return trial.test_loss
        return (trial.test_lost - trial.test_gained) / self.test_images

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> TrainedCase:
        """The inverse of `to_json`."""
        data = json.loads(line)
        data["trials"] = tuple(SettingTrial(**trial) for trial in data["trials"])
        return cls(**data)


def small_space() -> Space:
    """S of 2 or 4 and every top-k, at 64 x 64 pixels."""
    return Space(model="biformer_tiny", height=SIDE, width=SIDE, default_n_win=4)


def small_model(classes: int = 10, **more: Any) -> Backbone:
    """A BiFormer of five blocks with few channels."""
    return build(
        "biformer_tiny",
        depth=(1, 1, 2, 1),
        embed_dim=(32, 64, 96, 128),
        qk_dims=(32, 64, 96, 128),
        n_win=4,
        num_classes=classes,
        auto_pad=True,
        backend=BACKEND,
        **more,
    )


def run_case(data: str, seed: int, trained: str, size: Size, *, say: Say = lambda text: None) -> TrainedCase:
    """Train one network and try other settings on it."""
    pictures = get_data_set(data)
    space = small_space()
    own = space.setting(4, TRAINED[trained])
    torch.manual_seed(seed)
    model = small_model(pictures.classes)
    train = pictures.draw(size.train, "train", seed)
    assert train.labels is not None
    train_shared(
        model, train.images, train.labels, lambda: own, size.recipe, seed=seed, augment=pictures.augment
    )
    proxy, test = (
        pictures.draw(size.proxy, "test", 2 * seed + 1),
        pictures.draw(size.test, "test", 2 * seed + 2),
    )
    assert proxy.labels is not None
    assert test.labels is not None
    before, before_test = _observe(model, own, proxy.images), _observe(model, own, test.images)
    trials = []
    for setting in spread(space, own, size.settings, seed):
        after, after_test = _observe(model, setting, proxy.images), _observe(model, setting, test.images)
        apart = _apart(before.features[0], after.features[0])
        trials.append(
            trial_of(
                space, setting, (before, after), proxy.labels, (before_test, after_test), test.labels,
                features=apart,
            )
        )  # fmt: skip
    found = TrainedCase(
        data=data,
        seed=seed,
        trained=trained,
        top1=float((before_test.top == test.labels).float().mean()),
        images=len(proxy),
        test_images=len(test),
        trials=tuple(trials),
        created_utc=utc_now(),
    )
    say(
        f"{data}, seed {seed}, trained {trained}: top-1 {100 * found.top1:.1f} %; Spearman with lost top-1: "
        + ", ".join(f"{name} {rank_of(found, name):.2f}" for name in PROXIES)
    )
    return found


def rank_of(case: TrainedCase, proxy: str) -> float:
    """Spearman's correlation of a proxy and the loss of top-1 over the settings of a case."""
    return spearman([t.proxies[proxy] for t in case.trials], [case.drop(t) for t in case.trials])


def run_study(
    path: Path,
    size: Size,
    *,
    data: Sequence[str] = tuple(DATA_SETS),
    seeds: Iterable[int] = range(5),
    trained: Sequence[str] = tuple(TRAINED),
    say: Say = lambda text: None,
    run: Callable[..., TrainedCase] = run_case,
) -> list[TrainedCase]:
    """Every case that a file does not hold yet, one after the other; returns all of them.

    Args:
        path: JSON Lines, one case each; a line is written when its case is done.
        size: Of the study.
        data: Names of data sets.
        seeds: Of weights, pictures and settings.
        trained: Names of `TRAINED`.
        say: Told about every case.
        run: Makes a case.

    Raises:
        StoreError: the file cannot be read or written, or holds cases of another size.
    """
    cases = read_cases(path)
    for case in cases:
        if len(case.trials) != size.settings:
            raise StoreError(
                f"{path} holds networks with {len(case.trials)} settings each, and {size.settings} are asked "
                "for; another folder would work"
            )
    there = {case.key for case in cases}
    for seed in seeds:
        for name in data:
            for own in trained:
                if (name, seed, own) in there:
                    continue
                case = run(name, seed, own, size, say=say)
                try:
                    with path.open("a", encoding="utf-8") as file:
                        file.write(case.to_json() + "\n")
                except OSError as error:
                    raise StoreError(
                        f"cases cannot be written to {path}: {error.strerror or error}"
                    ) from None
                cases.append(case)
    return cases


def read_cases(path: Path) -> list[TrainedCase]:
    """The cases of a file; none where there is no file.

    Raises:
        StoreError: the file cannot be read, or a line is no case.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            found.append(TrainedCase.from_json(line))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}, line {number}: is no case of the study ({error})") from None
    return found


def trial_of(
    space: Space, setting: Setting, proxy: tuple[Observed, Observed], labels: Tensor,
    test: tuple[Observed, Observed], test_labels: Tensor, *, features: float, test_loss: float | None = None,
) -> SettingTrial:  # fmt: skip
    """What proxies say of a setting, and what happened.

    Args:
        space: Of the setting.
        setting: What was tried.
        proxy: The model with its own setting and with this one, on pictures that proxies may see.
        labels: Of these.
        test: The same on the test pictures.
        test_labels: Of those.
        features: How far features are apart.
        test_loss: See `SettingTrial`.
    """
    before, after = proxy
    right, now = (seen.top == labels for seen in proxy)
    right_test, now_test = (seen.top == test_labels for seen in test)
    return SettingTrial(
        setting=str(setting),
        keys=keys_of(space, setting),
        proxies=proxies_of(before, after, features=features),
        lost=int((right & ~now).sum()),
        gained=int((~right & now).sum()),
        differ=int((before.top != after.top).sum()),
        test_lost=int((right_test & ~now_test).sum()),
        test_gained=int((~right_test & now_test).sum()),
        test_loss=test_loss,
    )


def _observe(model: Backbone, setting: Setting, images: Tensor, *, batch: int = 64) -> Observed:
    reroute(model, setting.n_win, setting.topks)
    model.eval()
    logits, features = [], []
    with torch.no_grad():
        for some in torch.split(images, batch):
            pooled = model.forward_features(some).mean((2, 3))
            features.append(pooled)
            logits.append(model.head(pooled))
    seen = routed_regions(model, images[:ROUTING_PICTURES])
    return Observed(torch.cat(logits), (torch.cat(features),), seen)


def _apart(own: Tensor, other: Tensor) -> float:
    """Relative L2 distance of pooled features, mean over pictures."""
    return float(((own - other).norm(dim=1) / own.norm(dim=1).clamp_min(1e-12)).mean())


def keys_of(space: Space, setting: Setting) -> int:
    """Keys per query of the routed stages, added up."""
    found = 0
    for i in space.routed:
        problem = space.stage(i, setting.n_win[i], setting.topks[i]).problem
        found += 0 if problem is None else problem.keys_per_query
    return found


def spread(space: Space, own: Setting, count: int, seed: int) -> list[Setting]:
    """Settings near and far from the weights' own: half differ from it in one stage, half in any."""
    rng = random.Random(seed)
    found: dict[str, Setting] = {}
    for n in range(40 * count):
        if len(found) == count:
            break
        sides, topks = list(own.n_win), list(own.topks)
        one = rng.choice([w.n_win for w in space.shared_windows()]) if n % 2 else sides[0]
        changed = space.routed if n % 2 else (rng.choice(space.routed),)
        for i in space.routed:
            sides[i] = one
            if i in changed or topks[i] not in space.topks(i, one):
                topks[i] = rng.choice(space.topks(i, one))
        setting = space.setting(sides, topks)
        if space.model_key(setting) != space.model_key(own):
            found.setdefault(space.model_key(setting), setting)
    return list(found.values())
