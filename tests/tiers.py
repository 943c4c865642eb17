"""Which cases of a matrix `make test` runs; `make test-all` runs all of them."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(fast: Callable[[Any], bool], values: Iterable) -> list:
    """The values as parameters, marked slow where they are not `fast`."""
    return [x if fast(x) else pytest.param(x, marks=pytest.mark.slow) for x in values]
