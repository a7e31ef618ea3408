"""The demonstration: both methods on real images, from training to kernels. An example; the core never imports it."""

from .story import DemoFailure, Plan, run
from .training import Recipe

__all__ = ["DemoFailure", "Plan", "Recipe", "run"]
