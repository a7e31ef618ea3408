"""Where images come from: folders, lists, Parquet files and tar shards, cut into shards that are written one by one."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
TARS = (".tar", ".tar.gz", ".tgz")
PARQUET = ".parquet"
LISTS = (".txt", ".lst")
ENCODED = ("image", "bytes", "jpg", "png")  # columns of encoded images, or of structs that hold them (Hugging Face)
NAMED = ("path", "file", "filename", "url", "id", "key")  # columns that name an image
AT_ONCE = 256  # rows of Parquet that are held
UNOPENED = (FileNotFoundError, PermissionError)  # of the machine, rather than of what is in the file


class Encoded(NamedTuple):
    """An image as it came: its name, its bytes, or why there are none; then the file that could not be opened too."""

    path: str
    data: bytes
    error: str | None = None
    unopened: str = ""


@dataclass(frozen=True)
class Shard:
    """What goes into one output file: image files, or all of one Parquet or tar file."""

    number: int
    kind: str  # "files", "parquet", "tar"
    paths: tuple[str, ...]

    def images(self, folder: str = "") -> Iterator[Encoded]:
        """The images, in order. What cannot be read comes with the reason, as does a shard that ends early.

        Args:
            folder: where relative paths begin; default the working directory.
        """
        if self.kind == "files":
            for path in self.paths:
                yield _read(os.path.join(folder, path))._replace(path=path)
            return
        (path,) = self.paths
        file, count = os.path.join(folder, path), 0
        try:
            for image in _tar(file, path) if self.kind == "tar" else _parquet(file, path):
                yield image
                count += 1
        except Exception as error:  # a damaged shard; what came before it stands
            reason = str(error).splitlines()[0] if str(error) else ""
            unopened = file if isinstance(error, UNOPENED) else ""
            yield Encoded(path, b"", f"damaged behind {count} images: {type(error).__name__}: {reason}", unopened)


def shards_of(source: str | Path, size: int) -> list[Shard]:
    """A source cut into shards: ``size`` files each, or one Parquet or tar file each.

    Args:
        source: an image; a folder of images, Parquet or tar files (searched through); a .txt of paths, one a line,
            relative to where it stands; a Parquet or tar file; or a pattern of those: ``photos/*.tar``.
        size: files in a shard.

    Raises:
        FileNotFoundError: there is no such file or folder, or no image in it.
        ValueError: a folder holds files of several kinds.
    """
    path = Path(source)
    if not path.exists() and any(sign in str(source) for sign in "*?["):
        base = Path(path.anchor or ".")
        matching = base.glob(str(path.relative_to(path.anchor) if path.anchor else path))
        found = sorted(entry for entry in matching if entry.is_file())
    elif path.is_dir():
        found = sorted(entry for entry in path.rglob("*") if entry.is_file() and _kind(entry) is not None)
    elif path.suffix in LISTS and path.is_file():
        lines = path.read_text().splitlines()
        found = [path.parent / line for line in lines if line]
        return _of_files(found, size)
    else:
        found = [path] if path.is_file() else []
    kinds = {kind for entry in found if (kind := _kind(entry)) is not None}
    if not kinds:
        raise FileNotFoundError(
            f"source: got {str(source)!r}, wanted a folder, list, Parquet or tar file that exists and holds images"
        )
    if len(kinds) > 1:
        raise ValueError(f"source: {str(source)!r} holds files of several kinds ({', '.join(sorted(kinds))}); name one")
    if kinds == {"files"}:
        return _of_files(found, size)
    (kind,) = kinds
    return [Shard(number, kind, (str(entry),)) for number, entry in enumerate(found)]


def _of_files(paths: list[Path], size: int) -> list[Shard]:
    names = [str(path) for path in paths]
    starts = range(0, len(names), size)
    return [Shard(number, "files", tuple(names[begin : begin + size])) for number, begin in enumerate(starts)]


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    if name.endswith(TARS):
        return "tar"
    if name.endswith(PARQUET):
        return "parquet"
    return "files" if name.endswith(IMAGES) else None


def _read(path: str) -> Encoded:
    try:
        return Encoded(path, Path(path).read_bytes())
    except OSError as error:
        unopened = path if isinstance(error, UNOPENED) else ""
        return Encoded(path, b"", f"{type(error).__name__}: {error.strerror}", unopened)


def _tar(file: str, name: str) -> Iterator[Encoded]:
    with tarfile.open(file, "r|*") as tar:  # as a stream: no index is read first
        for member in tar:
            if member.isfile() and member.name.lower().endswith(IMAGES):
                inner = tar.extractfile(member)
                assert inner is not None
                yield Encoded(f"{name}/{member.name}", inner.read())


def _parquet(path: str, called: str) -> Iterator[Encoded]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        column = next((name for name in (*ENCODED, *NAMED[:3]) if name in names), None)
        if column is None:
            raise ValueError(f"columns {', '.join(names)}, wanted one of {', '.join((*ENCODED, *NAMED[:3]))}")
        naming = next((name for name in NAMED if name in names), None)
        wanted, row = list(dict.fromkeys([column, *([naming] if naming else [])])), 0
        for batch in file.iter_batches(batch_size=AT_ONCE, columns=wanted):
            for values in batch.to_pylist():
                name = values[naming] if naming else None
                yield _row(values[column], f"{called}#{row}" if name is None else str(name), Path(path).parent)
                row += 1


def _row(value: Any, name: str, folder: Path) -> Encoded:
    """A cell of a column of images: bytes, a struct of bytes and path, or a path."""
    if isinstance(value, dict):
        name = str(value.get("path") or name)
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Encoded(name, value)
    if isinstance(value, str):
        return _read(str(folder / value))._replace(path=name)
    return Encoded(name, b"", f"a {type(value).__name__} in its column, wanted bytes or a path")
