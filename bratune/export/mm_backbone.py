"""mm backbone: importing this module registers ``BratuneBiFormer`` with the dense-task frameworks.

Exported configs of style ``1.x`` import it through ``custom_imports``. It is registered in the root registry
of mmengine, where mmseg 1.x and mmdet 3.x find it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bratune.errors import MissingPackageError
from bratune.kernels.biformer import BiFormer
from bratune.kernels.checkpoint import load_weights

try:
    from mmengine.registry import MODELS
except ModuleNotFoundError as error:
    if error.name != "mmengine":
        raise
    raise MissingPackageError("mmengine", "the exported mmseg and mmdet configs") from None

__all__ = ["BratuneBiFormer"]


@MODELS.register_module()
class BratuneBiFormer(BiFormer):
    """The four normalised maps of a BiFormer, strides 4 to 32, with any backend.

    Args:
        pretrained: Weights file to start from.
        norm_eval: Keep batch normalisation in evaluation mode while training, as detection does.
        trust_checkpoint: Let the weights file run code of its own while it is read.
        init_cfg: Accepted because frameworks pass it; ``pretrained`` is what loads weights.
        arguments: Those of `bratune.kernels.biformer.BiFormer`.
    """

    def __init__(
        self,
        *,
        pretrained: str | None = None,
        norm_eval: bool = False,
        trust_checkpoint: bool = False,
        init_cfg: Any = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**{**arguments, "features_only": True})
        self.norm_eval = norm_eval
        if pretrained:
            load_weights(self, pretrained, trust=trust_checkpoint)

    def init_weights(self) -> None:
        """Nothing: weights were drawn, or loaded, when the model was made."""

    def train(self, mode: bool = True) -> BratuneBiFormer:
        """As every module, but batch normalisation stays in evaluation mode with ``norm_eval``."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, x: torch.Tensor) -> Any:
        """``[B, 3, H, W]`` to a tuple of four maps."""
        return super().forward(x)
