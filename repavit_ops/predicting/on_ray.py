"""The same predictor on a Ray cluster: Ray Data reads, decodes and computes, and comes back shard by shard.

Decoding tasks and predicting actors overlap, and Ray holds back who is ahead. What comes back is small: paths, errors,
labels, features. Rows carry their place, so that a shard is whole in whatever order Ray gives them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .decoding import Decoded, blank
from .nodes import CONFIG, DECODER, actors_of, connect, nodes, require_model, this_node, why_another
from .predictor import Predictor, without_unreadable
from .preprocessing import Preprocessing
from .sources import Shard

CARRIED = ("number", "place", "last", "path", "error", "unopened", "node")  # columns that an actor only hands on


def computed(
    predictor: Predictor, shards: list[Shard], batch: int, address: str, actors: int | None, digest: str | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every shard's number and columns, as they are finished.

    Args:
        predictor: is made again from its arguments, in each actor.
        shards: to do; relative paths are of this process's working directory, which others do not have.
        batch: images at once.
        address: of the cluster.
        actors: how many; default as many as there is room for.
        digest: sha256 of the model's file, None where it is a folder or a name.

    Raises:
        ImportError: Ray is not installed.
        RuntimeError: the machines have no room for ``actors`` predictors and one decoder; one of them cannot open an
            image that this one can; a task or an actor raised, with what it raised.
        ValueError: the predictor's model was given as a module, which other machines do not have; its file is not on
            all of them, or another one is.
    """
    try:
        import ray
    except ImportError:
        raise ImportError('ray: it is not installed: pip install "repavit-ops[ray]"') from None
    if not predictor.named:
        raise ValueError("ray: got a predictor of a module, wanted one of a file or name that every machine can open")
    if not shards:
        return
    connect(address)
    count, name = _checked(predictor, actors, digest)
    data = ray.data.from_items(
        [{"number": shard.number, "kind": shard.kind, "paths": list(shard.paths)} for shard in shards],
        override_num_blocks=len(shards),
    )
    # not map_batches, which actors of one CPU would run inside (findings/ray_fuses_decoders_into_actors.sh)
    pixels = data.flat_map(_Decoder(predictor.preprocessing, batch, os.getcwd()), num_cpus=DECODER)
    arguments = {**predictor.arguments, "preprocessing": predictor.preprocessing, "threads": predictor.threads}
    results = pixels.map_batches(
        _Actor,
        fn_constructor_args=(name, digest, arguments),
        batch_size=batch,
        num_cpus=predictor.threads,
        num_gpus=int(predictor.device.type == "cuda"),
        compute=ray.data.ActorPoolStrategy(size=count),
    )
    # a decoder hands on its batches one by one, not a shard at once; else actors wait, and the last ones work alone
    results.context.target_max_block_size = batch * blank(predictor.preprocessing).nbytes
    results.context.enable_progress_bars = False
    silent = {shard.number: shard for shard in shards}
    for number, columns in _whole(_opened(_told(results.iter_batches(batch_size=None, batch_format="numpy")))):
        silent.pop(number, None)
        yield number, columns
    nothing = torch.zeros((0, *blank(predictor.preprocessing).shape), dtype=torch.uint8)
    for number, shard in silent.items():
        if shard.kind == "files":  # a tar or Parquet file may hold no image, these are known to
            raise RuntimeError(f"ray: nothing came back of {shard.paths[0]}; run again, which does it anew")
        yield number, {"path": [], **predictor.predict(nothing), "error": []}


def _checked(predictor: Predictor, actors: int | None, digest: str | None) -> tuple[int, str]:
    """How many actors there are, and the model's name on every machine; raises where the cluster is not fit for it."""
    machines = nodes()
    gpus = [node.gpus for node in machines]
    on_gpus = predictor.device.type == "cuda"
    count = actors_of([node.cpus for node in machines], predictor.threads, actors, gpus if on_gpus else None)
    if sum(gpus) and not on_gpus:
        told = f"ray: this predictor computes on CPUs and leaves the cluster's {sum(gpus)} GPUs alone"
        warnings.warn(f'{told}; device="cuda" takes one for each actor', stacklevel=2)
    if digest is None and not os.path.isfile(os.path.join(predictor.name, CONFIG)):
        return count, predictor.name  # of timm or of the hub: each machine fetches it
    name = os.path.abspath(predictor.name)
    require_model([node for node in machines if node.cpus >= predictor.threads], name, digest)
    return count, name


class _Decoder:
    """A shard in, a row for each of its images out."""

    def __init__(self, preprocessing: Preprocessing, batch: int, folder: str) -> None:
        self.preprocessing, self.batch, self.folder = preprocessing, batch, folder

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        shard = Shard(int(row["number"]), str(row["kind"]), tuple(str(path) for path in row["paths"]))
        place, node = 0, this_node()
        for got in Decoded([shard], self.preprocessing, self.batch, self.folder):
            left = len(got.paths)
            rows = zip(got.paths, got.pixels.numpy(), got.errors, got.unopened, strict=True)
            for path, pixels, error, unopened in rows:
                left -= 1
                carried = {"number": shard.number, "place": place, "last": got.last and not left, "node": node}
                yield {**carried, "path": path, "pixels": pixels, "error": error or "", "unopened": unopened}
                place += 1


class _Actor:
    """One predictor of the cluster."""

    def __init__(self, name: str, digest: str | None, arguments: dict[str, Any]) -> None:
        # looked at before, but Ray starts actors on machines that came later too
        if digest is not None and (reason := why_another(name, digest)) is not None:
            raise ValueError(f"model: got {name!r}, which on {this_node()} is not what it was: {reason}")
        self.predictor = Predictor(name, **arguments)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pixels = torch.from_numpy(np.ascontiguousarray(batch.pop("pixels")))
        errors = [error or None for error in batch["error"]]
        return {**batch, **without_unreadable(self.predictor.predict(pixels), errors)}


def _told(batches: Any) -> Iterator[dict[str, np.ndarray]]:
    """Batches; where one of Ray's own errors comes instead, what it ends with: the line that a task or actor raised."""
    import ray

    try:
        yield from batches
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"ray: {str(error).strip().splitlines()[-1].strip()} (what is written stands)") from error


def _opened(batches: Any) -> Iterator[dict[str, np.ndarray]]:
    """Batches, as long as their images could be opened where they were decoded, if they can be here.

    An image that is missing everywhere is a row with the reason; one that is missing on one machine is not the image's
    fault, and its row would stay in the folder for good.
    """
    for batch in batches:
        for unopened, node, error in zip(batch["unopened"], batch["node"], batch["error"], strict=True):
            if unopened and _can_be_opened(unopened):
                raise RuntimeError(
                    f"ray: {unopened} cannot be opened on {node} ({error}), and can be here; give all machines the "
                    "images by the same path, and run again: what is written stands"
                )
        yield batch


def _can_be_opened(path: str) -> bool:
    try:
        with open(path, "rb"):
            return True
    except OSError:
        return False


def _whole(batches: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Shards whose rows are all there, each in the order of its images."""
    waiting: dict[int, list[dict[str, np.ndarray]]] = {}
    missing: dict[int, int] = {}  # rows; negative while the last one is not there
    for batch in batches:
        for number in np.unique(batch["number"]).tolist():
            rows = {name: column[batch["number"] == number] for name, column in batch.items()}
            waiting.setdefault(number, []).append(rows)
            missing[number] = missing.get(number, 0) - len(rows["place"])
            missing[number] += int((rows["place"][rows["last"]] + 1).sum())
            if missing[number] == 0:
                yield number, _columns(waiting.pop(number))
    if waiting:
        raise RuntimeError(f"ray: {len(waiting)} shards came back in part; run again, which does them anew")


def _columns(parts: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(rows["place"])
    computed = {name: column[order] for name, column in rows.items() if name not in CARRIED}
    paths, errors = rows["path"][order].tolist(), rows["error"][order].tolist()
    return {"path": paths, **computed, "error": [error or None for error in errors]}
