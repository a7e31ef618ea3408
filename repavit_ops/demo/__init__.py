"""The demonstration: both methods on real images, from training to kernels. An example; the core never imports it."""

from .digits import Recipe
from .story import DemoFailure, Plan, run

__all__ = ["DemoFailure", "Plan", "Recipe", "run"]
