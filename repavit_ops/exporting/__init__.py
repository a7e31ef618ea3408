"""Models for other runtimes: written with the settings that keep them exact, run there, held against float64.

The obvious export is not exact everywhere: at opset 20 some runtimes take GELU for its tanh form, for example. So the
settings are chosen here, and every file is run before it is handed out (docs/exporting.md has the figures).
"""

from .checked import Exported, export_model

__all__ = ["Exported", "export_model"]
