"""The versions of the packages that a run depends on."""

import functools

PACKAGES = ("torch", "numpy", "safetensors", "hydra-core", "omegaconf", "tensorboard")


@functools.cache
def packages() -> dict[str, str]:
    """The versions of the packages that the results of a run may depend on."""
    from importlib import metadata  # imported here: it takes 5 % of the time of `--help`

    return {name: metadata.version(name) for name in PACKAGES}
