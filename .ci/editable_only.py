"""The build backend: setuptools, for `pip install -e .` only.

A copy in `site-packages` would have neither the demo model nor the data beside it, and its modules
are called `utils` and `config`. So it is refused, with what to do.
"""

import sys

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  # what pip calls
    build_editable,
    get_requires_for_build_editable,
    prepare_metadata_for_build_editable,
)

REFUSAL = "error: minllama runs from its folder; install it with: pip install -e ."


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings)


def build_wheel(*_args: object) -> str:
    sys.exit(REFUSAL)


def build_sdist(*_args: object) -> str:
    sys.exit(REFUSAL)
