"""One recipe, many methods: the same data, seeds and step budget, one table and one page."""

from leantune.comparison.compare import Comparison, compare
from leantune.comparison.methods import DEFAULT_METHODS, PARTS

__all__ = ["DEFAULT_METHODS", "PARTS", "Comparison", "compare"]
