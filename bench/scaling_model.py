"""What bounds predictions on many machines:  python bench/scaling_model.py [--machines 64] [--gpu-rate 5000] …

A prediction, not a measurement. Every image passes these stations, and the slowest one gives the images a second:

    model      machines · gpus · gpu rate · kept            kept: what the engine leaves of the model's rate
    decoding   machines · cores · 1000 / decode ms
    copies     machines · memory GB/s / (copies · pixels)   decoder, object store, batch, and to the GPU
    PCIe       machines · gpus · PCIe GB/s / pixels
    network    machines · network GB/s / travels            files where each machine decodes its own, else pixels too
    files      file system GB/s / file                      all machines together, unless files stand on each
    writing    writers · writer rows/s                      one process for each run of ``predict``

``pixels`` is 3 · side² bytes, ``file`` those of an encoded image. Replace every number by your own: ``python
bench/ray_actors.py`` measures the model's rate, the milliseconds of decoding and what the engine keeps.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Cluster:
    """Machines and images; rates are of one piece each."""

    machines: int = 1
    gpus: int = 8  # of a machine
    cores: int = 128  # of a machine, for decoding
    gpu_rate: float = 5000.0  # images a second that a GPU computes, decoded ones
    kept: float = 0.92  # of that rate, beside the engine
    decode_ms: float = 3.5  # of a core, for an image: a JPEG of 500 x 375, one core of a Zen 3
    side: int = 224  # pixels
    file_kb: float = 110.0  # of an encoded image
    copies: int = 4  # times that the pixels of an image are written to memory
    memory_gbs: float = 200.0  # of a machine
    pcie_gbs: float = 25.0  # of a GPU
    network_gbs: float = 12.5  # of a machine
    pixels_travel: float = 0.0  # share of images that are decoded on another machine than computed
    files_gbs: float = 40.0  # of the file system, to all machines together
    writers: int = 1  # runs of ``predict`` that share the images out
    writer_rows: float = 100_000.0  # a second of a run: labels and scores of five classes, one core of a Zen 3


def limits(cluster: Cluster) -> dict[str, float]:
    """Images a second that each station lets through."""
    many, pixels, file = cluster.machines, 3 * cluster.side**2, 1000 * cluster.file_kb
    return {
        "model": many * cluster.gpus * cluster.gpu_rate * cluster.kept,
        "decoding": many * cluster.cores * 1000 / cluster.decode_ms,
        "copies": many * cluster.memory_gbs * 1e9 / (cluster.copies * pixels),
        "PCIe": many * cluster.gpus * cluster.pcie_gbs * 1e9 / pixels,
        "network": many * cluster.network_gbs * 1e9 / (file + cluster.pixels_travel * pixels),
        "files": cluster.files_gbs * 1e9 / file,
        "writing": cluster.writers * cluster.writer_rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Cluster):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    given = Cluster(**vars(parser.parse_args()))
    cases = {
        f"{given.machines} x {given.gpus} GPUs": given,
        "the same, decoded anywhere": replace(given, pixels_travel=1 - 1 / given.machines),
    }
    names = list(limits(given))
    print(f"| predicted images/s | {' | '.join(names)} | all | bound by | of the GPUs |\n|{'---|' * (len(names) + 4)}")
    for name, cluster in cases.items() if given.machines > 1 else [next(iter(cases.items()))]:
        print(line(name, cluster))


def line(name: str, cluster: Cluster) -> str:
    """A cluster's limits as a line of a table, with the least of them and what share of the GPUs' rate that is."""
    found = limits(cluster)
    bound = min(found, key=found.__getitem__)
    share = found[bound] / (cluster.machines * cluster.gpus * cluster.gpu_rate)
    numbers = " | ".join(f"{rate:,.0f}" for rate in found.values())
    return f"| {name} | {numbers} | {found[bound]:,.0f} | {bound} | {share:.0%} |"


if __name__ == "__main__":
    main()
