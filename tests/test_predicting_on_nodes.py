"""Images by the folder on a Ray cluster of several nodes: where actors run, what not every node has, a node that dies.

The nodes are processes of this machine (``ray.cluster_utils``), each with its own id, CPUs and working directory. What
a node does not have is named through /proc/self/cwd, another folder in processes of another working directory.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
from model_helpers import tiny_vit
from predicting_helpers import encoded, folder_of_photographs, photographs, rows_of, wait_for_parts

import repavit_ops
from repavit_ops.predicting import Predictor, nodes, on_ray, predict, run
from repavit_ops.predicting.nodes import actors_of

STORE = 2**27  # bytes of each node's store of objects
HERE = Path("/proc/self/cwd")  # for each process its own
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}

pytestmark = pytest.mark.filterwarnings("ignore:ray. this predictor computes on CPUs")


class Nodes(NamedTuple):
    """A cluster of a head with one CPU and two workers with two, of which the second stands in a folder of its own."""

    cluster: object
    second: object  # worker
    address: str
    folder: Path  # of the head, the first worker and this process
    other: Path  # of the second worker


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'repavit-ops[ray]'")
    from ray.cluster_utils import Cluster

    folder, other = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("other")
    before, cluster = Path.cwd(), Cluster()
    try:
        os.chdir(folder)
        cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=STORE, _system_config=QUICK)
        cluster.add_node(num_cpus=2, object_store_memory=STORE)
        os.chdir(other)
        second = cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=STORE)
        os.chdir(folder)
        ray.init(address=cluster.address, log_to_driver=False)
        yield Nodes(cluster, second, cluster.address, folder, other)
    finally:
        os.chdir(before)
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def model(tmp_path):
    file = tmp_path / "model.safetensors"
    repavit_ops.save_checkpoint(tiny_vit(), file)
    return file


def noted(monkeypatch, log, seconds=0.0):
    """Actors write their node and threads at every batch, and take their time."""

    class Noted(on_ray._Actor):  # of a function, so that Ray sends it to nodes that do not have this file
        def __call__(self, batch):
            import time

            import torch

            columns = super().__call__(batch)
            time.sleep(seconds)
            with open(log, "a") as file:
                file.write(f"{nodes.this_node()}|{torch.get_num_threads()}\n")
            return columns

    monkeypatch.setattr(on_ray, "_Actor", Noted)


def labels_of(out):
    return {path: row["labels"] for path, row in rows_of(out).items()}


def test_machines_without_room_are_said_and_not_waited_for(three, model, tmp_path):
    photos = folder_of_photographs(tmp_path / "photos")
    with pytest.raises(RuntimeError, match=r"has 2 x 2 \+ 1 x 1 CPUs, room for 0 actors of 3 threads .* wanted 1;"):
        predict(Predictor(model, threads=3), photos, tmp_path / "a", ray=three.address)
    with pytest.raises(RuntimeError, match=r"room for 2 actors of 2 threads .* wanted 3;"):
        predict(Predictor(model, threads=2), photos, tmp_path / "b", ray=three.address, actors=3)


@pytest.mark.parametrize(
    ("cpus", "threads", "room"),
    [((3,), 1, 2), ((8, 8), 5, 2), ((8, 8), 8, 1), ((4, 4, 1), 4, 2), ((0, 64), 16, 3), ((0, 0), 1, 0), ((), 1, 0)],
)
def test_an_actor_lies_on_one_machine_and_a_cpu_is_left_to_decode(cpus, threads, room):
    if room:
        assert nodes.actors_of(cpus, threads, None) == nodes.actors_of(cpus, threads, room) == room
    with pytest.raises(RuntimeError, match=f"room for {room} actors"):
        nodes.actors_of(cpus, threads, room + 1)


def test_a_model_that_a_node_does_not_have_or_has_another_of_is_said_before_any_work(three, tmp_path):
    named = HERE / "model.safetensors"
    repavit_ops.save_checkpoint(tiny_vit(), three.folder / named.name)
    predictor, settings = Predictor(named, threads=2), {"ray": three.address, "actors": 2}
    folder_of_photographs(three.folder / "photos")
    with pytest.raises(
        ValueError, match=r"model: got .* not the same on \S+ \(node \w{8}\): FileNotFoundError"
    ) as found:
        predict(predictor, three.folder / "photos", tmp_path / "a", **settings)
    assert str(found.value).count("(node ") == 1  # the first worker, which has it, is not named
    repavit_ops.save_checkpoint(tiny_vit(seed=1), three.other / named.name)
    with pytest.raises(ValueError, match=r"not the same on \S+ \(node \w{8}\): another file, by its sha256"):
        predict(predictor, three.folder / "photos", tmp_path / "a", **settings)
    assert not list((tmp_path / "a").glob("part-*"))


def test_a_model_that_changes_once_it_was_looked_at_is_said_by_the_actors(three, tmp_path, monkeypatch):
    """As by one on a machine that comes later; in one line, not in Ray's many."""
    named, photos = three.folder / "another.safetensors", folder_of_photographs(tmp_path / "photos")
    repavit_ops.save_checkpoint(tiny_vit(), named)
    written = lambda *given: repavit_ops.save_checkpoint(tiny_vit(seed=1), named)  # noqa: E731
    monkeypatch.setattr(on_ray, "require_model", written)
    wanted = r"^ray: ValueError: model: got .* which on \S+ \(node \w{8}\) is not what it was: another file"
    with pytest.raises(RuntimeError, match=wanted):
        predict(Predictor(named, threads=2), photos, tmp_path / "out", ray=three.address, actors=2)
    assert not list((tmp_path / "out").glob("part-*"))


def test_a_folder_of_transformers_is_looked_for_on_every_node(three):
    (three.folder / "vit").mkdir()
    (three.folder / "vit" / nodes.CONFIG).write_text("{}")
    workers = [node for node in nodes.nodes() if node.cpus == 2]
    with pytest.raises(ValueError, match=r"not the same on \S+ \(node \w{8}\): no folder with a config.json; copy it"):
        nodes.require_model(workers, str(HERE / "vit"), None)
    (three.other / "vit").mkdir()
    (three.other / "vit" / nodes.CONFIG).write_text("{}")
    nodes.require_model(workers, str(HERE / "vit"), None)


def test_images_that_a_node_cannot_open_are_its_fault_and_no_unreadable_ones(three, model, tmp_path, monkeypatch):
    photos = folder_of_photographs(three.folder / "photos")  # decoders run on the second worker too, which has none
    predictor, settings = Predictor(model, threads=1), {"batch": 1, "shard": 1, "ray": three.address, "actors": 1}
    with pytest.raises(RuntimeError, match=r"ray: /proc/self/cwd/photos/\S+ cannot be opened on \S+ \(node \w{8}\)"):
        predict(predictor, HERE / "photos", tmp_path / "a", **settings)
    assert all(row["error"] is None for row in rows_of(tmp_path / "a").values())

    find = run.shards_of
    monkeypatch.setattr(run, "shards_of", lambda *given: [find(*given), (photos / "a" / "00.png").unlink()][0])
    summary = predict(predictor, "photos", tmp_path / "b", **settings)  # relative: to this process's folder
    assert (summary.images, summary.unreadable) == (
        24,
        [("photos/a/00.png", "FileNotFoundError: No such file or directory")],  # which no node has
    )


def test_a_gpu_that_ray_gives_is_refused_and_one_that_it_only_has_is_left_alone(three, model, tmp_path):
    import ray

    photo = tmp_path / "photo.jpg"
    photo.write_bytes(encoded(photographs()[0]))
    with pytest.warns(UserWarning, match="this predictor computes on CPUs and leaves the cluster's 1 GPUs alone"):
        assert predict(Predictor(model, threads=2), photo, tmp_path / "out", ray=three.address, actors=1).images == 1
    rows = ray.data.from_items([{"path": str(photo)}])
    given = {"num_cpus": 1, "num_gpus": 1, "batch_size": 1, "compute": ray.data.ActorPoolStrategy(size=1)}
    with pytest.raises(ray.exceptions.RayError, match="num_gpus: Ray gave this predictor 1 GPUs, and it computes on"):
        rows.map_batches(Predictor, fn_constructor_args=(str(model),), **given).take_all()


def test_actors_on_gpus_are_as_many_as_machines_have():
    assert actors_of([16, 16, 64], 4, None, gpus=[8, 0, 2]) == 4 + 0 + 2
    assert actors_of([8], 4, None, gpus=[2]) == 1  # a CPU is left to decode
    with pytest.raises(RuntimeError, match="2 x 8 CPUs and 1 GPUs, room for 1 actors of 4 threads beside 1 CPU"):
        actors_of([8, 8], 4, 2, gpus=[1, 0])


def test_a_node_that_dies_in_mid_run_costs_nothing(three, model, tmp_path, monkeypatch):  # last: the node is gone then
    """Actors run on both workers, with as many threads as CPUs, until one worker is killed."""
    folder_of_photographs(tmp_path / "photos")
    log, out, settings = tmp_path / "log", tmp_path / "out", {"batch": 2, "shard": 2}
    noted(monkeypatch, log, 0.3)
    predictor, before = Predictor(model, top_k=3, threads=2), []

    def kill():
        wait_for_parts(out, 2)
        before.append(log.read_text())
        three.cluster.remove_node(three.second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    summary = predict(predictor, tmp_path / "photos", out, ray=three.address, actors=2, **settings)
    killer.join()
    assert (summary.images, summary.unreadable) == (24, [])
    lines = {tuple(line.split("|")) for line in before[0].splitlines()}
    assert len({node for node, _ in lines}) == 2
    assert {threads for _, threads in lines} == {"2"}
    assert len(list(out.glob("part-*"))) == 12
    predict(predictor, tmp_path / "photos", tmp_path / "here", workers=0, **settings)
    assert labels_of(out) == labels_of(tmp_path / "here")
    assert not list(out.glob("*.unfinished"))
