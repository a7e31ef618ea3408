"""Ray actors beside plain processes on the same cores:  python bench/ray_actors.py [--images 512] [--batch 8]

Four ways to use P cores: one process of one thread; one of P threads; P processes of one thread, each with its share of
the images; P Ray actors of one thread. Three sources: tensors, which only the model takes time for (no Ray); pixels,
BMP files of the model's size, which need no decoding to speak of; photos, JPEG files. Files go the whole way of
``repavit-ops predict``, each way in fresh processes. Images a second are the slope of the parts written over time, in
the middle three fifths, so that neither the start counts nor the end; the start is told by the first part.

An image's cores × seconds are those of the model (tensors), of decoding (alone), and the rest, which is the engine's:
copies, messages, waiting. P processes over one say what a second process is worth. Needs ``repavit-ops[ray]``, Linux
and a quiet machine; ``--json FILE`` appends a line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import repavit_ops
from repavit_ops.benchmarking.harness import machine
from repavit_ops.predicting import Predictor, Preprocessing, predict
from repavit_ops.predicting.sources import shards_of

SIDE = 224  # pixels of the model's input
PHOTO = (375, 500)  # pixels of a JPEG file, most of ImageNet's
PATIENCE = 600.0  # seconds that processes may take to start
SOURCES = ("tensors", "pixels", "photos")


class Way(NamedTuple):
    """So many processes of so many threads, or actors of Ray."""

    processes: int
    threads: int
    ray: bool = False

    def __str__(self) -> str:
        return f"{self.processes} x {self.threads}{' Ray' if self.ray else ''}"


class Measured(NamedTuple):
    """Images a second, and seconds to the first part."""

    rate: float
    first: float


def write_images(folder: Path, count: int) -> None:
    """Crops of scikit-learn's two photographs: BMP in ``pixels``, JPEG in ``photos``."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos, generator = load_sample_images().images, np.random.default_rng(0)
    for name, (height, width), suffix in (("pixels", (SIDE, SIDE), "bmp"), ("photos", PHOTO, "jpg")):
        (folder / name).mkdir()
        for number in range(count):
            top, left = generator.integers(0, 428 - height), generator.integers(0, 641 - width)
            crop = photos[number % 2][top : top + height, left : left + width]
            Image.fromarray(crop).save(folder / name / f"{number:05d}.{suffix}")


def preprocessing_of(source: str) -> Preprocessing | None:
    """None: the model's own."""
    return Preprocessing((SIDE, SIDE), (SIDE, SIDE), squash=True) if source == "pixels" else None


def prepare(folder: Path, name: str, count: int) -> None:
    """Images and the packed file of a model of random weights."""
    write_images(folder, count)
    torch.manual_seed(0)
    model = repavit_ops.create_model(name).eval()
    repavit_ops.save_packed(repavit_ops.fuse(model, keep_unpacked=False), folder / "model.safetensors")


def decoding(folder: Path, source: str) -> float:
    """Seconds of one core to read and decode an image."""
    predictor = Predictor(folder / "model.safetensors", preprocessing=preprocessing_of(source), threads=1)
    (shard,) = shards_of(folder / source, 10**9)
    images = [image.data for image in list(shard.images())[:64]]
    for image in images[:8]:
        predictor.decoded(image)
    began = time.process_time()
    for image in images:
        assert predictor.decoded(image)[1] is None
    return (time.process_time() - began) / len(images)


def work(folder: Path, out: Path, source: str, way: Way, batch: int, images: list[str], ready: Any) -> float:
    """One process's share; returns when it began, by the clock of files."""
    if way.ray:
        import ray

        ray.init(num_cpus=way.processes * way.threads + 1, include_dashboard=False, log_to_driver=False)
    predictor = Predictor(folder / "model.safetensors", preprocessing=preprocessing_of(source), threads=way.threads)
    pixels = torch.zeros(batch, 3, SIDE, SIDE, dtype=torch.uint8)
    for _ in range(2):
        predictor.predict(pixels)
    ready.wait(PATIENCE)
    began = time.time()
    out.mkdir()
    if source == "tensors":
        for part in range(len(images) // batch):
            predictor.predict(pixels)
            (out / f"part-{part}.parquet").touch()
    else:
        listed = out.with_suffix(".txt")
        listed.write_text("\n".join(images))
        cluster: dict[str, Any] = {"ray": "auto", "actors": way.processes} if way.ray else {}
        predict(predictor, listed, out, batch=batch, shard=batch, **cluster)
    return began


def fresh(count: int) -> ProcessPoolExecutor:
    """Processes that share nothing with this one, and may have children."""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def measured(folder: Path, source: str, way: Way, batch: int) -> Measured:
    """One way over one source."""
    images = sorted(str(path) for path in (folder / ("pixels" if source == "tensors" else source)).iterdir())
    workers = 1 if way.ray else way.processes
    with tempfile.TemporaryDirectory(dir=folder) as scratch, multiprocessing.Manager() as manager:
        ready = manager.Barrier(workers)
        with fresh(workers) as pool:
            outs = [Path(scratch) / f"out{number}" for number in range(workers)]
            running = [
                pool.submit(work, folder, out, source, way, batch, images[number::workers], ready)
                for number, out in enumerate(outs)
            ]
            began = min(each.result() for each in running)
        times = np.sort([part.stat().st_mtime - began for out in outs for part in out.glob("part-*.parquet")])
    fifth = len(times) // 5
    middle = times[fifth : len(times) - fifth]
    return Measured(batch * float(np.polyfit(middle, np.arange(len(middle)), 1)[0]), float(times[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vanilla_deit_small")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a line there")
    arguments = parser.parse_args()
    many = arguments.processes
    if arguments.images < 10 * arguments.batch * many:
        parser.error(f"--images: got {arguments.images}, wanted at least 10 batches for each process")
    ways = [Way(1, 1), Way(1, many), Way(many, 1), Way(many, 1, ray=True)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with fresh(1) as pool:
            pool.submit(prepare, folder, arguments.model, arguments.images).result()
            decode = {source: pool.submit(decoding, folder, source).result() for source in SOURCES[1:]}
        found = {
            (source, way): measured(folder, source, way, arguments.batch)
            for source in SOURCES
            for way in ways
            if not (way.ray and source == "tensors")
        }
    rows = []
    columns = (
        "source",
        "processes x threads",
        "images/s",
        f"over {ways[1]}",
        "ms: model",
        "decoding",
        "the rest",
        "start, s",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for (source, way), got in found.items():
        ratio = got.rate / found[source, ways[1]].rate
        cores = 1000 * way.processes * way.threads
        model = cores / found["tensors", way._replace(ray=False)].rate
        decoder = 1000 * decode.get(source, 0.0)
        rest = cores / got.rate - model - decoder
        times = " | ".join(f"{each:.1f}" for each in (model, decoder, rest, got.first))
        print(f"| {source} | {way} | {got.rate:.1f} | {ratio:.2f}x | {times} |")
        row = {"source": source, **way._asdict(), "images_per_s": got.rate, "ratio": ratio, "model_ms": model}
        rows.append({**row, "decoding_ms": decoder, "rest_ms": rest, "start_s": got.first})
    if arguments.json is not None:
        given = {"case": "ray_actors", "model": arguments.model, "images": arguments.images, "batch": arguments.batch}
        with arguments.json.open("a") as file:
            file.write(
                json.dumps({**given, "pixels_kib": 3 * SIDE**2 / 1024, "machine": machine(), "rows": rows}) + "\n"
            )


if __name__ == "__main__":
    main()
