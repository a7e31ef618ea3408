"""A safetensors file written to be mapped: every tensor begins at a cache line, and reading one copies nothing.

safetensors knows neither alignment nor gaps. So the header is filled up with spaces, and what is missing behind a
tensor is a tensor of its own, named ``padding.N``; any reader of safetensors reads such a file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LINE = 64  # bytes: tensors begin at multiples of it, as memory of PyTorch's own does
PADDING = "padding."
PACKED = "repavit_ops.packed"  # in the metadata of packed models: what packed_models.py writes there
DIGEST = "data_sha256"  # in the metadata: of all bytes behind the header
LARGEST_HEADER = 100 * 2**20  # bytes; safetensors' own limit
LENGTH = struct.Struct("<Q")  # of the header, in front of it
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor stands in the data behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class MappedFile:
    """The tensors of a file, as memory of the file itself: processes that map it share its pages.

    The map is private: what is written to a tensor goes to a copy of the page in this process and never to the file.
    The file must stay as it is while it is mapped; whoever replaces it does so under another inode, as
    :func:`write_mapped` does.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no whole safetensors file: too short or too long, a header that is no JSON, tensors that
            overlap, leave gaps or do not fit their bytes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"path: got {str(path)!r}, wanted an existing file")
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < LENGTH.size:
                raise self.damaged(f"{size} bytes hold no header")
            self._memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        (length,) = LENGTH.unpack(self._memory[: LENGTH.size])
        if length > min(LARGEST_HEADER, size - LENGTH.size):
            raise self.damaged(f"it says that its header has {length} bytes, and has {size} itself")
        self._data = LENGTH.size + length
        self.metadata, self.entries = self._header(self._memory[LENGTH.size : self._data], size - self._data)

    def damaged(self, why: str) -> ValueError:
        """The error for a file that is not what was written."""
        return ValueError(
            f"{self.path.name}: got a damaged file or one of another kind ({why}); write it again with "
            "repavit_ops.save_packed or repavit-ops convert --packed"
        )

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file, none of whose bytes are read before they are used."""
        entry = self.entries[name]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        count = (entry.end - entry.begin) // entry.dtype.itemsize
        flat = torch.frombuffer(self._memory, dtype=entry.dtype, count=count, offset=self._data + entry.begin)
        return flat.view(entry.shape)

    def require_digest(self) -> None:
        """Read all data and raise ValueError if it is not what was written."""
        with memoryview(self._memory) as whole, whole[self._data :] as data:
            found = hashlib.sha256(data).hexdigest()
        if found != self.metadata.get(DIGEST):
            raise self.damaged(f"its data has the sha256 {found[:12]}…, and its header says otherwise")

    def _header(self, text: bytes, available: int) -> tuple[dict[str, str], dict[str, Entry]]:
        try:
            header: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.damaged(f"its header is no JSON: {error}") from error
        if not isinstance(header, dict):
            raise self.damaged("its header is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self.damaged("its metadata are no strings")
        entries = {name: self._entry(name, value) for name, value in header.items()}
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != end:
                raise self.damaged(f"{name} begins at byte {entry.begin} of the data, wanted {end}")
            end = entry.end
        if end != available:
            raise self.damaged(f"its tensors end at byte {end} of the data, of which there are {available}")
        return metadata, entries

    def _entry(self, name: str, value: Any) -> Entry:
        fields: dict[str, Any] = value if isinstance(value, dict) else {}
        dtype = DTYPES.get(str(fields.get("dtype")))
        shape, span = _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
        if dtype is None or shape is None or span is None or len(span) != 2:
            raise self.damaged(f"{name} has no dtype, shape and offsets that this version knows")
        count = 1
        for side in shape:
            count *= side
        if span[1] - span[0] != count * dtype.itemsize:
            raise self.damaged(f"{name} has {span[1] - span[0]} bytes for the shape {shape} of {dtype}")
        if span[0] % dtype.itemsize:
            raise self.damaged(f"{name} begins at byte {span[0]} of the data, in the middle of a {dtype}")
        return Entry(dtype, tuple(shape), span[0], span[1])


def write_mapped(path: Path, tensors: Mapping[str, Sequence[Tensor]], metadata: Mapping[str, str]) -> None:
    """Write tensors so that :class:`MappedFile` finds each at a cache line; replaces a file once all is written.

    Args:
        path: of the file.
        tensors: each as itself, or as 1-dimensional pieces of one dtype, written one behind the other.
        metadata: strings; the sha256 of the data is added to them.

    Raises:
        OSError: the folder cannot be written, or the disk is full; nothing is left behind.
        ValueError: a tensor is of a dtype that safetensors does not know.
    """
    header: dict[str, Any] = {"__metadata__": {**metadata, DIGEST: "0" * 64}}
    order: list[Sequence[Tensor]] = []
    end = 0
    for name, pieces in tensors.items():
        dtype = pieces[0].dtype
        if dtype not in NAMES:
            raise ValueError(f"{name}: got {dtype}, which no safetensors file holds")
        shape = list(pieces[0].shape) if len(pieces) == 1 else [sum(piece.numel() for piece in pieces)]
        begin, end = end, end + sum(piece.numel() for piece in pieces) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        order.append(pieces)
        if missing := -end % LINE:
            header[f"{PADDING}{len(order)}"] = {"dtype": "U8", "shape": [missing], "data_offsets": [end, end + missing]}
            order.append([torch.zeros(missing, dtype=torch.uint8)])
            end += missing
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(_encoded(header))
            digest = hashlib.sha256()
            for piece in _bytes(order):
                digest.update(piece)
                file.write(piece)
            header["__metadata__"][DIGEST] = digest.hexdigest()
            file.seek(0)
            file.write(_encoded(header))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _encoded(header: Mapping[str, Any]) -> bytes:
    """Length and header, such that the data behind them begins at a cache line."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH.size + len(text)) % LINE)
    return LENGTH.pack(len(text)) + text


def _bytes(order: Sequence[Sequence[Tensor]]) -> Iterator[memoryview]:
    for pieces in order:
        for piece in pieces:
            if piece.numel():
                yield piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _sizes(values: Any) -> list[int] | None:
    """Numbers of a header that may be sizes or offsets; None for anything else."""
    fit = isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)
    return values if fit else None
