"""Precision: which dtype each kind of value has, and the loss scale. The public names."""

from lorica.precision.loss_scale import DynamicScale, LossScale, StaticScale, make_loss_scale
from lorica.precision.policy import Precision, dtype_from_name

__all__ = ["DynamicScale", "LossScale", "Precision", "StaticScale", "dtype_from_name", "make_loss_scale"]
