"""Images by the folder on a Ray cluster of this machine: what one process gives, and each once, whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from model_helpers import tiny_vit
from predicting_helpers import PATIENCE, folder_of_photographs, parquet, rows_of, wait_for_parts

import repavit_ops
from repavit_ops.predicting import Predictor, on_ray, predict
from repavit_ops.predicting.predictor import given_cpus


@pytest.fixture
def folder(tmp_path):
    return folder_of_photographs(tmp_path / "photos")


@pytest.fixture
def predictor():
    return Predictor(tiny_vit(), top_k=3, threads=1)


def test_shards_come_whole_and_in_order_however_their_rows_come():
    sizes, generator = (5, 1, 7), np.random.default_rng(0)
    rows = [(number, place) for number, size in enumerate(sizes) for place in range(size)]
    rows = [rows[index] for index in generator.permutation(len(rows))]

    def batch(some):
        return {
            "number": np.array([number for number, _ in some]),
            "place": np.array([place for _, place in some]),
            "last": np.array([place == sizes[number] - 1 for number, place in some]),
            "path": np.array([f"{number}/{place}" for number, place in some], dtype=object),
            "error": np.array(["damaged" if place == 3 else "" for _, place in some], dtype=object),
            "label": np.array([10 * number + place for number, place in some]),
        }

    found = dict(on_ray._whole(batch(rows[begin : begin + 4]) for begin in range(0, len(rows), 4)))
    assert sorted(found) == [0, 1, 2]
    for number, size in enumerate(sizes):
        assert found[number]["path"] == [f"{number}/{place}" for place in range(size)]
        assert found[number]["label"].tolist() == [10 * number + place for place in range(size)]
        assert found[number]["error"] == ["damaged" if place == 3 else None for place in range(size)]
    with pytest.raises(RuntimeError, match="2 shards came back in part"):
        list(on_ray._whole([batch([(0, 0)]), batch([(2, 6)])]))


@pytest.fixture(scope="module")
def cluster():
    """A Ray of three CPUs in this machine."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'repavit-ops[ray]'")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    yield ray
    ray.shutdown()


def test_a_cluster_gives_what_this_process_gives(cluster, folder, tmp_path):
    file = tmp_path / "model.safetensors"
    repavit_ops.save_checkpoint(tiny_vit(), file)
    predictor = Predictor(file, top_k=3, features=True, threads=1)
    (folder / "empty.jpg").write_bytes(b"")
    predict(predictor, folder, tmp_path / "here", workers=0, shard=4)
    summary = predict(predictor, folder, tmp_path / "there", batch=5, shard=4, ray="auto", actors=2)
    assert (summary.images, summary.computed) == (25, 25)
    here, there = rows_of(tmp_path / "here"), rows_of(tmp_path / "there")
    assert here.keys() == there.keys()
    for path, row in here.items():
        assert there[path]["labels"] == row["labels"]
        assert there[path]["error"] == row["error"]
        np.testing.assert_allclose(there[path]["features"], row["features"], rtol=1e-5, atol=1e-5)
    schemas = [parquet.read_schema(tmp_path / name / "part-00000.parquet") for name in ("here", "there")]
    assert schemas[0] == schemas[1]
    (tmp_path / "there" / "part-00002.parquet").unlink()
    assert predict(predictor, folder, tmp_path / "there", shard=4, ray="auto", actors=1).computed == 4
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    assert predict(predictor, tmp_path / "none.tar", tmp_path / "none", ray="auto", actors=1).images == 0


KILLED = """
import os, sys, time, types, torch
sys.modules["torchvision._meta_registrations"] = types.ModuleType("stub")
from repavit_ops.predicting import Predictor, on_ray, predict
model, folder, out, address = sys.argv[1:]

class Slow(on_ray._Actor):
    def __call__(self, batch):
        open(f"{out}.pids", "a").write(f"{os.getpid()}\\n")
        time.sleep(0.3)
        return super().__call__(batch)

on_ray._Actor = Slow
predict(Predictor(model, top_k=3, threads=1), folder, out, batch=2, shard=2, ray=address, actors=2)
"""


def test_a_killed_actor_costs_nothing_and_a_killed_driver_goes_on_with_each_image_once(cluster, folder, tmp_path):
    model, out = tmp_path / "model.safetensors", tmp_path / "out"
    repavit_ops.save_checkpoint(tiny_vit(), model)
    settings = {"batch": 2, "shard": 2}

    def started():
        address = cluster.get_runtime_context().gcs_address  # "auto" is the latest cluster that anyone started
        command = [sys.executable, "-c", KILLED, str(model), str(folder), str(out), address]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)

    process = started()
    wait_for_parts(out, 1, process)
    process.kill()  # the driver: Ray ends its actors
    process.communicate()
    done = len(list(out.glob("part-*.parquet")))
    assert 1 <= done < 12
    process = started()
    wait_for_parts(out, done + 1, process)
    pids = (tmp_path / "out.pids").read_text().split()
    os.kill(int(pids[-1]), signal.SIGKILL)  # an actor: Ray starts another, and does its batches again
    assert process.wait(PATIENCE) == 0, process.stderr.read().decode()
    assert len(set((tmp_path / "out.pids").read_text().split()) - set(pids)) >= 1
    assert predict(Predictor(model, top_k=3, threads=1), folder, out, workers=0, **settings).computed == 0
    there, here = rows_of(out), tmp_path / "here"
    predict(Predictor(model, top_k=3, threads=1), folder, here, workers=0, **settings)
    assert {path: row["labels"] for path, row in there.items()} == {p: r["labels"] for p, r in rows_of(here).items()}
    assert len(there) == 24
    assert not list(out.glob("*.unfinished"))


def test_a_cluster_that_is_too_small_is_said_and_not_waited_for(cluster, folder, tmp_path, predictor):
    file = tmp_path / "model.safetensors"
    repavit_ops.save_checkpoint(tiny_vit(), file)
    with pytest.raises(
        RuntimeError, match="has 1 x 3 CPUs, room for 2 actors of 1 threads beside 1 CPU for decoding, wanted 3"
    ):
        predict(Predictor(file, threads=1), folder, tmp_path / "a", ray="auto", actors=3)
    with pytest.raises(RuntimeError, match="has 1 x 3 CPUs, room for 0 actors of 3 threads"):
        predict(Predictor(file, threads=3), folder, tmp_path / "b", ray="auto")
    with pytest.raises(ValueError, match="wanted one of a file or name"):
        predict(predictor, folder, tmp_path / "c", ray="auto")


def test_threads_are_the_cpus_that_ray_gave(cluster):
    task = cluster.remote(given_cpus)
    assert cluster.get(task.options(num_cpus=2).remote()) == 2
    assert cluster.get(task.options(num_cpus=1).remote()) == 1
    assert given_cpus() == len(os.sched_getaffinity(0))  # the driver was given none
