"""The same predictor on a Ray cluster: Ray Data reads, decodes and computes, and comes back shard by shard.

Decoding tasks and predicting actors overlap, and Ray holds back who is ahead. What comes back is small: paths, errors,
labels, features. Rows carry their place, so that a shard is whole in whatever order Ray gives them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .predictor import Predictor, blank, decoded, without_unreadable
from .preprocessing import Preprocessing
from .sources import Shard

DECODER = 1  # CPUs that are left to decoding, at least


def computed(
    predictor: Predictor, shards: list[Shard], batch: int, address: str, actors: int | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every shard's number and columns, as they are finished.

    Raises:
        ImportError: Ray is not installed.
        RuntimeError: the cluster has fewer CPUs than ``actors`` predictors and one decoder take.
        ValueError: the predictor's model was given as a module, which other machines do not have.
    """
    try:
        import ray
    except ImportError:
        raise ImportError('ray: it is not installed: pip install "repavit-ops[ray]"') from None
    if not predictor.named:
        raise ValueError("ray: got a predictor of a module, wanted one of a file or name that every machine can open")
    if not shards:
        return
    _connect(address)
    count = _actors(int(ray.cluster_resources().get("CPU", 0)), predictor.threads, actors)
    data = ray.data.from_items([{"number": s.number, "kind": s.kind, "paths": list(s.paths)} for s in shards])
    rows = data.repartition(len(shards)).flat_map(_Decoder(predictor.preprocessing), num_cpus=DECODER)
    named = os.path.abspath(predictor.name) if os.path.exists(predictor.name) else predictor.name
    arguments = {**predictor.arguments, "preprocessing": predictor.preprocessing, "threads": predictor.threads}
    results = rows.map_batches(
        _Actor,
        fn_constructor_args=(named, arguments),
        batch_size=batch,
        num_cpus=predictor.threads,
        compute=ray.data.ActorPoolStrategy(size=count),
    )
    empty = {shard.number for shard in shards}
    for number, columns in _whole(results.iter_batches(batch_size=None, batch_format="numpy")):
        empty.discard(number)
        yield number, columns
    nothing = torch.zeros((0, *blank(predictor.preprocessing).shape), dtype=torch.uint8)
    for number in sorted(empty):
        yield number, {"path": [], **predictor.predict(nothing), "error": []}


def _connect(address: str) -> None:
    """Join the cluster at an address; "auto": the one that runs, else one of this machine alone."""
    import ray

    if ray.is_initialized():
        return
    try:
        ray.init(address=address, log_to_driver=False)
    except ConnectionError:
        if address != "auto":
            raise
        ray.init(log_to_driver=False)


def _actors(cpus: int, threads: int, wanted: int | None) -> int:
    """How many predictors of so many threads there are, with a CPU left to decode; says so where there can be none."""
    count = (cpus - DECODER) // threads if wanted is None else wanted
    if count < 1 or count * threads + DECODER > cpus:
        raise RuntimeError(
            f"ray: the cluster has {cpus} CPUs, wanted {max(count, 1) * threads + DECODER}: {max(count, 1)} actors of "
            f"{threads} threads and {DECODER} for decoding; give fewer actors or threads, or a larger cluster"
        )
    return count


class _Decoder:
    """A shard in, a row for each of its images out."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        shard = Shard(int(row["number"]), str(row["kind"]), tuple(str(path) for path in row["paths"]))
        held = None
        for place, encoded in enumerate(shard.images()):
            if held is not None:
                yield {**held, "last": False}
            image, error = blank(self.preprocessing), encoded.error
            if error is None:
                image, error = decoded(self.preprocessing, encoded.data)
            held = {"number": shard.number, "place": place, "path": encoded.path, "pixels": image, "error": error or ""}
        if held is not None:
            yield {**held, "last": True}


class _Actor:
    """One predictor of the cluster."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self.predictor = Predictor(name, **arguments)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pixels = torch.from_numpy(np.ascontiguousarray(batch.pop("pixels")))
        errors = [error or None for error in batch["error"]]
        return {**batch, **without_unreadable(self.predictor.predict(pixels), errors)}


def _whole(batches: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Shards whose rows are all there, each in the order of its images."""
    waiting: dict[int, dict[int, dict[str, Any]]] = {}
    sizes: dict[int, int] = {}
    for batch in batches:
        for row in range(len(batch["number"])):
            values = {name: column[row] for name, column in batch.items()}
            number, place = int(values["number"]), int(values["place"])
            waiting.setdefault(number, {})[place] = values
            if values["last"]:
                sizes[number] = place + 1
            if sizes.get(number) == len(waiting[number]):
                yield number, _columns([row for _, row in sorted(waiting.pop(number).items())])
    if waiting:
        raise RuntimeError(f"ray: {len(waiting)} shards came back in part; run again, which does them anew")


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    computed = [name for name in rows[0] if name not in ("number", "place", "last", "path", "error")]
    columns: dict[str, Any] = {"path": [str(row["path"]) for row in rows]}
    columns |= {name: np.stack([row[name] for row in rows]) for name in computed}
    return {**columns, "error": [str(row["error"]) or None for row in rows]}
