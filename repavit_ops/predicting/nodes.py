"""The machines of a Ray cluster: how many predictors they have room for, and whether each has the model's own file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ..checkpoints.mapped_file import sha256_of

CONFIG = "config.json"  # of a folder of transformers
DECODER = 1  # CPUs that are left to decoding, at least


class Node(NamedTuple):
    """A machine of the cluster."""

    id: str
    address: str
    cpus: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.address} (node {self.id[:8]})"


def connect(address: str) -> None:
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


def nodes() -> list[Node]:
    """The machines that are there."""
    import ray

    return [_node(found) for found in ray.nodes() if found["Alive"]]


def this_node() -> str:
    """What errors call the machine that this task runs on."""
    import ray

    return str(Node(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), 0, 0))


def _node(found: dict) -> Node:
    resources = found["Resources"]
    address = str(found["NodeManagerAddress"])
    return Node(str(found["NodeID"]), address, int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


def actors_of(cpus: Sequence[int], threads: int, wanted: int | None, gpus: Sequence[int] | None = None) -> int:
    """How many predictors there are, each on one machine, with a CPU left to decode.

    Args:
        cpus: of each machine.
        threads: of a predictor.
        wanted: so many of them; default as many as there is room for.
        gpus: of each machine, if a predictor takes one.

    Raises:
        RuntimeError: there is no room for them, where Ray would wait for machines without a word.
    """
    places = [count // threads for count in cpus]
    if gpus is not None:
        places = [min(pair) for pair in zip(places, gpus, strict=True)]
    room = sum(places)
    if sum(cpus) - room * threads < DECODER:
        room -= 1
    count = room if wanted is None else wanted
    if not 1 <= count <= room:
        machines = " + ".join(f"{many} x {count}" for count, many in sorted(Counter(cpus).items(), reverse=True))
        beside = "" if gpus is None else f" and {sum(gpus)} GPUs"
        raise RuntimeError(
            f"ray: the cluster has {machines} CPUs{beside}, room for {max(room, 0)} actors of {threads} threads beside "
            f"{DECODER} CPU for decoding, wanted {max(count, 1)}; give fewer actors or threads, or larger machines"
        )
    return count


def why_another(path: str, digest: str | None) -> str | None:
    """Why a file or folder of this machine is not the one of the process that started the run; None if it is.

    Args:
        path: of the file, or of a folder of transformers, of which only its being there is looked at.
        digest: its sha256 there; None of a folder.
    """
    try:
        if digest is None:
            return None if os.path.isfile(os.path.join(path, CONFIG)) else f"no folder with a {CONFIG}"
        return None if sha256_of(path) == digest else "another file, by its sha256"
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"


def require_model(machines: Sequence[Node], path: str, digest: str | None) -> None:
    """Look at the model's file on every machine before any work is given out.

    Raises:
        ValueError: some machines do not have it, or have another one; all of them are named.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    looked = ray.remote(num_cpus=0)(why_another)
    asked = [
        looked.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(path, digest)
        for node in machines
    ]
    found = zip(machines, ray.get(asked), strict=True)
    if wrong := [f"{node}: {reason}" for node, reason in found if reason is not None]:
        raise ValueError(
            f"model: got {path!r}, which is here and not the same on {'; '.join(wrong)}; copy it there, or put it on a "
            "file system that all machines see"
        )
