"""Where the time of a model goes, by the parts of its blocks; an extra that the core never imports."""

from .forms import profile_forms
from .profile import Part, Profile, product_peak, profile

__all__ = ["Part", "Profile", "product_peak", "profile", "profile_forms"]
