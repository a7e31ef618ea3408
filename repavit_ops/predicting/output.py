"""A folder of Parquet files, one for each shard of a run that may be killed at any time and goes on where it was.

``run.json`` says what the run is of, ``shards.jsonl`` which images are in which shard, ``part-00000.parquet`` is what
came of shard 0. A part is written aside and renamed, so that one that is there is whole; any other is done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .sources import Shard

RUN, SHARDS, UNREADABLE, LOCK = "run.json", "shards.jsonl", "unreadable.jsonl", ".lock"


class Output:
    """The folder of one run.

    Args:
        folder: made if it is not there.
        settings: JSON values that a run cannot change half-way.
        find: finds the shards, of a run that begins; one that goes on keeps those that it began with.

    Raises:
        OSError: the folder cannot be written.
        RuntimeError: another process is writing there.
        ValueError: the folder holds a run of other settings, or files that are of none.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], find: Callable[[], list[Shard]]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder / LOCK)
        for aside in folder.glob("*.unfinished"):
            aside.unlink()
        kept = folder / RUN
        if kept.is_file():
            self._require_same(json.loads(kept.read_text()), dict(settings))
            lines = (folder / SHARDS).read_text().splitlines()
            self.shards = [Shard(number, kind, tuple(paths)) for number, kind, paths in map(json.loads, lines)]
            return
        if strange := [entry.name for entry in folder.glob("part-*.parquet")]:
            raise ValueError(f"out: {folder} holds {strange[0]} and no {RUN}: no run of ours; give another folder")
        self.shards = find()
        rows = (json.dumps([shard.number, shard.kind, shard.paths]) for shard in self.shards)
        self._write(SHARDS, ("\n".join(rows) + "\n").encode())
        self._write(RUN, json.dumps(dict(settings), indent=2).encode())  # last: with it the run has begun

    def left(self) -> list[Shard]:
        """The shards that are not done."""
        return [shard for shard in self.shards if not self.path(shard.number).is_file()]

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"part-{number:05d}.parquet"

    def write(self, number: int, columns: Mapping[str, Any]) -> None:
        """Write what came of a shard: a column each, arrays [B] and [B, n] or lists."""
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.table({name: _column(values) for name, values in columns.items()})
        aside = self.path(number).with_suffix(".unfinished")
        try:
            with aside.open("wb") as file:
                parquet.write_table(table, file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path(number))
        finally:
            aside.unlink(missing_ok=True)

    def finish(self) -> tuple[int, list[tuple[str, str]]]:
        """Count the images of all parts; list the unreadable ones, in a file too where there are any."""
        from pyarrow import parquet

        count, unreadable = 0, list[tuple[str, str]]()
        for shard in self.shards:
            table = parquet.read_table(self.path(shard.number), columns=["path", "error"])
            count += len(table)
            found = table.filter(table["error"].is_valid()).to_pylist()
            unreadable += [(row["path"], row["error"]) for row in found]
        lines = "".join(json.dumps({"path": path, "error": error}) + "\n" for path, error in unreadable)
        if lines:
            self._write(UNREADABLE, lines.encode())
        return count, unreadable

    def close(self) -> None:
        """Let others write there."""
        self._lock.close()

    def _require_same(self, kept: dict[str, Any], settings: dict[str, Any]) -> None:
        other = [
            f"{name} {kept.get(name)!r} (now {value!r})" for name, value in settings.items() if kept.get(name) != value
        ]
        if other:
            raise ValueError(
                f"out: {self.folder} holds a run of other settings: {', '.join(other)}; go on with the same ones, or "
                "give another folder"
            )

    def _write(self, name: str, data: bytes) -> None:
        aside = self.folder / f"{name}.unfinished"
        try:
            aside.write_bytes(data)
            os.replace(aside, self.folder / name)
        finally:
            aside.unlink(missing_ok=True)


def _locked(path: Path) -> Any:
    """The lock file of a folder, locked until it is closed or the process ends, however it ends."""
    file = path.open("w")
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which the decoding children would inherit
    except ImportError:
        pass  # no such locks on this system; two runs into one folder are the user's to avoid
    except OSError as error:
        file.close()
        raise RuntimeError(f"out: another process is writing into {path.parent}; wait for it, or end it") from error
    return file


def _column(values: Any) -> Any:
    """An Arrow column: rows of an array [B, n] become lists of fixed size."""
    import pyarrow as pa

    if isinstance(values, np.ndarray) and values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return pa.array(values, type=pa.string()) if isinstance(values, list) else pa.array(values)


def joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Batches of columns, one behind the other.

    Raises:
        ValueError: features or scores of two widths.
    """
    every = list(parts)
    columns: dict[str, Any] = {}
    for name in every[0]:
        values = [part[name] for part in every]
        if isinstance(values[0], list):
            columns[name] = [value for part in values for value in part]
            continue
        if len(widths := {value.shape[1:] for value in values}) > 1:
            raise ValueError(f"{name}: got rows of several widths, {sorted(widths)}; a dataset has one")
        columns[name] = np.concatenate(values)
    return columns
