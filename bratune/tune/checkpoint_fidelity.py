"""Checkpoint fidelity: what another S or top-k does to the outputs of trained weights, without training.

S and top-k own no parameters, so that any setting can be tried on given weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bratune.kernels.backbone import Backbone
from bratune.kernels.biformer import build
from bratune.kernels.checkpoint import load_weights, read_weights
from bratune.measure.ranks import clopper_pearson
from bratune.tune import evidence as labels_of
from bratune.tune.evidence import Evidence, LayerRecall
from bratune.tune.fidelity import (
    agreement,
    divergence,
    feature_distance,
    mean_interval,
    paired_change,
)
from bratune.tune.fidelity_source import Fidelity
from bratune.tune.lost_accuracy import ALLOWED_LOSS, CONFIDENCE, Counts
from bratune.tune.pictures import Pictures
from bratune.tune.recall import model_recall
from bratune.tune.setting import Setting
from bratune.tune.space import Space

__all__ = ["CheckpointFidelity", "load_checkpoint", "outputs", "reroute"]


def reroute(model: Backbone, n_win: Sequence[int], topks: Sequence[int]) -> None:
    """Let the routed stages of a model use another S and top-k from now on.

    Args:
        model: Stages that are not routed are left alone.
        n_win: Regions per side of each stage.
        topks: Of each stage.
    """
    for stage, s, k in zip(model.stages, n_win, topks, strict=True):
        for module in stage.modules():
            if _is_routed(module):
                module.n_win, module.topk = s, k  # type: ignore[assignment]  # nn.Module types them as tensors
    if hasattr(model, "n_wins"):
        model.n_wins = tuple(n_win)  # type: ignore[assignment]


def _is_routed(module: nn.Module) -> bool:
    return hasattr(module, "n_win") and hasattr(module, "topk") and hasattr(module, "region_of")


# Computes attention without scores in memory and accepts any problem, gradients not needed.
BACKEND = "gather-sdpa"
# Recall costs full attention, and differs little between pictures.
RECALL_PICTURES = 16


def load_checkpoint(model: str, path: str | Path, *, features_only: bool = False) -> Backbone:
    """A model with trained weights and as many classes as they have, ready for any S and any map.

    Raises:
        CheckpointError: the weights do not fit the model.
    """
    weights = read_weights(path)
    head = weights.get("head.weight")
    arguments: dict[str, Any] = {"features_only": features_only}
    if head is not None and not features_only:
        arguments["num_classes"] = head.shape[0]
    if model.startswith("biformer_stl") is False:
        arguments["auto_pad"] = True
    net = build(model, **arguments)
    load_weights(net, path)
    return net


def outputs(model: Backbone, images: Tensor, *, batch: int = 32) -> list[Tensor]:
    """Outputs of a model, on the CPU: ``[logits]``, or one map per level where it has no head.

    Args:
        model: In evaluation mode afterwards.
        images: ``[N, 3, H, W]``.
        batch: Images per forward pass.
    """
    model.eval()
    first = next(model.parameters())
    parts: list[list[Tensor]] = []
    with torch.no_grad():
        for some in torch.split(images, batch):
            made: Any = model(some.to(device=first.device, dtype=first.dtype))
            made = made if isinstance(made, tuple | list) else (made,)
            parts.append([t.float().cpu() for t in made])
    return [torch.cat(levels) for levels in zip(*parts, strict=True)]


class CheckpointFidelity:
    """A `bratune.tune.fidelity_source.FidelitySource` over trained weights and calibration images.

    Args:
        model: From `load_checkpoint`, on the device to use.
        space: Model and resolution.
        reference: The setting that the weights were trained with (or its like at this resolution).
        pictures: Calibration images; labels make the evidence a measured top-1.
        weights_key: Names the weights.
        confidence: Of upper limits of lost top-1, one-sided.
        batch: Images per forward pass.
    """

    def __init__(
        self,
        model: Backbone,
        space: Space,
        reference: Setting,
        pictures: Pictures,
        *,
        weights_key: str = "",
        confidence: float = CONFIDENCE,
        batch: int = 32,
    ) -> None:
        model.set_backend(BACKEND)
        self.model, self.space, self.reference, self.pictures = model, space, reference, pictures
        self.batch, self.confidence = batch, confidence
        self._weights_key = weights_key
        self._seen: dict[str, Fidelity] = {}
        self._reference_outputs = self._run(reference)

    @classmethod
    def open(
        cls,
        space: Space,
        reference: Setting,
        path: str | Path,
        pictures: Pictures,
        *,
        device: str = "cpu",
        features_only: bool = False,
        confidence: float = CONFIDENCE,
    ) -> CheckpointFidelity:
        """The fidelity of a weights file; see the class."""
        model = load_checkpoint(space.model, path, features_only=features_only).to(device)
        key = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
        return cls(model, space, reference, pictures, weights_key=key, confidence=confidence)

    @property
    def key(self) -> str:
        """Weights, pictures and reference."""
        text = f"{self._weights_key}-{self.pictures.key}-{self.space.model_key(self.reference)}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def limits(self) -> dict[str, float]:
        """Loss of top-1 that each rule accepts at most; 0 where no answers can be counted."""
        return dict(ALLOWED_LOSS) if self.has_head else dict.fromkeys(ALLOWED_LOSS, 0.0)

    @property
    def has_head(self) -> bool:
        """Whether outputs are class scores."""
        return not self.model.features_only

    def stage_loss(self, index: int, n_win: int, topk: int) -> float:
        """Divergence of the reference with only one stage changed."""
        sides, topks = list(self.reference.n_win), list(self.reference.topks)
        sides[index], topks[index] = n_win, topk
        return self.joint(self.space.setting(sides, topks)).loss

    def joint(self, setting: Setting) -> Fidelity:
        """Divergence and evidence of a whole setting."""
        key = self.space.model_key(setting)
        if key not in self._seen:
            self._seen[key] = self._judge(self._run(setting))
        return self._seen[key]

    def correct(self, setting: Setting) -> Tensor | None:
        """Whether each picture is classified correctly, ``[N]`` bool; None without labels."""
        if self.pictures.labels is None or not self.has_head:
            return None
        return self._run(setting)[0].argmax(1) == self.pictures.labels

    def recall(self, setting: Setting) -> tuple[LayerRecall, ...]:
        """The attention mass in the routed regions of every routed layer, on the first pictures."""
        reroute(self.model, setting.n_win, setting.topks)
        return model_recall(self.model, self.pictures.images[:RECALL_PICTURES])

    def _run(self, setting: Setting) -> list[Tensor]:
        reroute(self.model, setting.n_win, setting.topks)
        return outputs(self.model, self.pictures.images, batch=self.batch)

    def _judge(self, made: Sequence[Tensor]) -> Fidelity:
        if not self.has_head:
            return self._judge_features(made)
        reference, candidate = self._reference_outputs[0], made[0]
        values = divergence(reference, candidate)
        same = agreement(reference, candidate)
        count, agree = len(same), int(same.sum())
        counts = Counts(images=count, differ=count - agree)
        found = labels_of.agreement(
            images=count,
            agree=agree,
            bound=clopper_pearson(agree, count),
            kl=float(values.mean()),
            kl_interval=mean_interval(values),
            most_lost=counts.most_lost(self.confidence),
            confidence=self.confidence,
        )
        labels = self.pictures.labels
        if labels is not None:
            before, after = reference.argmax(1) == labels, candidate.argmax(1) == labels
            change, interval = paired_change(before, after)
            top1 = float(after.float().mean())
            lost, gained = int((before & ~after).sum()), int((~before & after).sum())
            counts = dataclasses.replace(counts, lost=lost, gained=gained)
            numbers = found.values
            found = labels_of.measured_top1(
                images=count,
                change=change,
                interval=interval,
                top1=top1,
                most_lost=counts.most_lost(self.confidence),
                confidence=self.confidence,
            )
            found.values.update({name: value for name, value in numbers.items() if name not in found.values})
        found.values["counts"] = dataclasses.asdict(counts)
        return Fidelity(loss=float(values.mean()), evidence=found)

    def _judge_features(self, made: Sequence[Tensor]) -> Fidelity:
        values = feature_distance(self._reference_outputs, made)
        low, high = mean_interval(values)
        mean = float(values.mean())
        text = (
            f"features differ by {mean:.1%} [{low:.1%}, {high:.1%}] (relative L2, mean over levels) from the "
            f"checkpoint's own setting on {len(values)} images; no bound on accuracy follows"
        )
        numbers = {"images": len(values), "feature_distance": mean, "interval": [low, high]}
        return Fidelity(loss=mean, evidence=Evidence(level="E2", text=text, values=numbers))
