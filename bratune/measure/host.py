"""Host: how long eager PyTorch takes on this host to launch an operation, which limits small batches.

The model of GPUs that are not here takes this as ``--host``; a host at hand says it of itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

__all__ = ["launch_us"]

# Layers of a linear layer, a normalisation and an activation, so small that the GPU is always waiting; fewer
# operations than a stream takes before it makes the host wait.
LAYERS = 100
OPERATIONS = 3 * LAYERS
ROUNDS = 11


def launch_us(device: str, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Microseconds per operation that the host needs for modules of eager PyTorch: median of eleven rounds.

    Args:
        device: A CUDA device; on a CPU, whose operations run at once, their own time would count too.
        clock: Seconds.
    """
    import torch
    from torch import nn

    layers = [nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU()) for _ in range(LAYERS)]
    model = nn.Sequential(*layers).to(device).eval()
    x = torch.zeros(8, 16, device=device)
    cuda = device.startswith("cuda")
    took = []
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            if cuda:
                torch.cuda.synchronize(device)
            start = clock()
            model(x)
            took.append(clock() - start)
    if cuda:
        torch.cuda.synchronize(device)
    return 1e6 * statistics.median(took[1:]) / OPERATIONS  # the first round loads kernels
