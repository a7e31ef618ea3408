"""Photographs for tests of predictions, and what came of them; skips where what reads and writes them is missing."""

from __future__ import annotations

import functools
import io
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'repavit-ops[predict]'")
parquet = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")
load_sample_images = pytest.importorskip("sklearn.datasets").load_sample_images
pytest.importorskip("tqdm")

PATIENCE = 300  # seconds that a run may take to start, on a machine that is busy


@functools.cache
def photographs():
    """Crops of two photographs, upright and lying ones."""
    generator, found = np.random.default_rng(0), []
    for number in range(24):
        photo = Image.fromarray(load_sample_images().images[number % 2])
        width, height = generator.integers(60, 200, 2)
        left, top = generator.integers(0, 400), generator.integers(0, 200)
        found.append(photo.crop((left, top, left + width, top + height)))
    return found


def encoded(photo, kind="JPEG"):
    file = io.BytesIO()
    photo.save(file, kind)
    return file.getvalue()


def folder_of_photographs(path):
    """The crops as files, in two folders below a path."""
    for number, photo in enumerate(photographs()):
        file = path / "ab"[number % 2] / f"{number:02d}.{'jpg' if number % 3 else 'png'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(photo, "JPEG" if number % 3 else "PNG"))
    return path


def rows_of(out):
    """All rows of a run by path; fails where one is there twice."""
    rows = [row for path in sorted(Path(out).glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]
    by_path = {row["path"]: row for row in rows}
    assert len(by_path) == len(rows)
    return by_path


def wait_for_parts(out, count, process=None):
    for _ in range(PATIENCE * 20):
        if len(list(out.glob("part-*.parquet"))) >= count:
            return
        assert process is None or process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    raise AssertionError(f"no part was written within {PATIENCE} seconds")
