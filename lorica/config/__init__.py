"""The configuration: DeepSpeed's keys as frozen models, read and checked without importing torch."""

from lorica.config.errors import MISSING, ConfigError, Problem
from lorica.config.load import load
from lorica.config.precision import TORCH_DTYPE
from lorica.config.report import check
from lorica.config.schema import Config, Provenance, schema_json

__all__ = ["MISSING", "TORCH_DTYPE", "Config", "ConfigError", "Problem", "Provenance", "check", "load", "schema_json"]
