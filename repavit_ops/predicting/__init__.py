"""An extra: a fused model over many images, from folders, lists, Parquet files or tar shards, into Parquet files."""

from .predictor import Predictor
from .preprocessing import Preprocessing
from .run import Summary, predict

__all__ = ["Predictor", "Preprocessing", "Summary", "predict"]
