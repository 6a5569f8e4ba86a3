"""What a user builds a model and an optimizer from, or puts into a model that is there: modules, optimizers, `inject`.

Each module is the torch module of the same name on every device, and each optimizer a torch optimizer.
"""

from __future__ import annotations

from lorica.ops.inject import Report, inject, undo
from lorica.ops.linear_cross_entropy import LazyHead, LinearCrossEntropy
from lorica.ops.modules import BiasGELU, FusedLayerNorm, FusedRMSNorm, SwiGLU
from lorica.ops.optimizers import (
    DeepSpeedCPUAdagrad,
    DeepSpeedCPUAdam,
    DeepSpeedCPULion,
    FusedAdam,
    FusedLAMB,
    FusedLamb,
    FusedLion,
    FusedSGD,
)

__all__ = [
    "BiasGELU",
    "DeepSpeedCPUAdagrad",
    "DeepSpeedCPUAdam",
    "DeepSpeedCPULion",
    "FusedAdam",
    "FusedLAMB",
    "FusedLamb",
    "FusedLayerNorm",
    "FusedLion",
    "FusedRMSNorm",
    "FusedSGD",
    "LazyHead",
    "LinearCrossEntropy",
    "Report",
    "SwiGLU",
    "inject",
    "undo",
]
