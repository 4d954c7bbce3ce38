"""Arithmetic with numbers that may not be known: None, which is not 0."""

from __future__ import annotations

import math
from collections.abc import Iterable


def product(*factors: float | None) -> float | None:
    """None if a factor is not known, unless another is 0."""
    if 0 in factors:
        return 0.0
    known = [factor for factor in factors if factor is not None]
    return math.prod(known) if len(known) == len(factors) else None


def total(terms: Iterable[float | None]) -> float | None:
    """None if a term is not known."""
    terms = list(terms)
    known = [term for term in terms if term is not None]
    return math.fsum(known) if len(known) == len(terms) else None


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None if either is not known, or the denominator is 0."""
    if numerator is None or not denominator:
        return None
    return numerator / denominator
