"""Optimizers on flat planes: the public names. Formulas are in one file each, the seam to the engine in base.py."""

from lorica.optim.adagrad import Adagrad
from lorica.optim.adam import Adam, AdamW
from lorica.optim.base import FlatOptimizer, Segment, Slice
from lorica.optim.lamb import Lamb
from lorica.optim.lion import Lion
from lorica.optim.muon import Muon
from lorica.optim.registry import ProvidesFlatOptimizer, from_client, from_config
from lorica.optim.sgd import SGD
from lorica.optim.torch_optim import TorchOptimizer

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "FlatOptimizer",
    "Lamb",
    "Lion",
    "Muon",
    "ProvidesFlatOptimizer",
    "Segment",
    "Slice",
    "TorchOptimizer",
    "from_client",
    "from_config",
]
