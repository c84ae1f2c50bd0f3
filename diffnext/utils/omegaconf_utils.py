"""The original's import path of configurations; the code is in :mod:`diffnext.config`."""

from diffnext.config.arithmetic import evaluate_arithmetic
from diffnext.config.load import (
    OmegaConfEncoder,
    config_to_yaml,
    flatten_omega_conf,
    get_config,
    save_config,
)
from diffnext.config.targets import ConfigError, config_to_class, config_to_object

__all__ = [
    "ConfigError",
    "OmegaConfEncoder",
    "config_to_class",
    "config_to_object",
    "config_to_yaml",
    "evaluate_arithmetic",
    "flatten_omega_conf",
    "get_config",
    "save_config",
]
