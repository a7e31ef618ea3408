#!/usr/bin/env bash
# Ray Data runs map_batches of tasks inside the actors of the next map_batches where both ask for one CPU.
#
# Guess: a stage of tasks that decode, in front of a stage of two actors that compute, runs beside the actors, whatever
# CPUs it asks for; and a generator that gives many rows for one keeps a stage of its own, whether map_batches or
# flat_map takes it.
# Seen (ray 2.60.0): with num_cpus=1, which the actors have too, no decoding task is started: the actors decode, each in
# front of its own computing, and take inputs by the batch of the second stage (8 shards at once, not 8 images). With
# num_cpus=0.5, or with flat_map, decoding runs in processes of its own. Ray keeps map_batches fused as older ones did,
# even where it changes the number of rows (operator_fusion.py, _can_fuse_map_ops).
#
#   map_batches, num_cpus=1: decoded inside the actors
#   map_batches, num_cpus=0.5: decoded beside the actors
#   flat_map, num_cpus=1: decoded beside the actors
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/probe.py" <<'PY'
import os

import numpy as np
import ray

ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)


def batches(rows):
    for item in rows["item"]:
        yield {"item": np.full(8, item), "decoder": np.full(8, os.getpid())}


def images(row):
    return [{"item": row["item"], "decoder": os.getpid()} for _ in range(8)]


class Model:
    def __call__(self, batch):
        return {**batch, "actor": np.full(len(batch["item"]), os.getpid())}


ways = {
    "map_batches, num_cpus=1": lambda data: data.map_batches(batches, batch_size=1, num_cpus=1),
    "map_batches, num_cpus=0.5": lambda data: data.map_batches(batches, batch_size=1, num_cpus=0.5),
    "flat_map, num_cpus=1": lambda data: data.flat_map(images, num_cpus=1),
}
inside = []
for name, decode in ways.items():
    shards = ray.data.from_items([{"item": item} for item in range(16)], override_num_blocks=16)
    rows = decode(shards).map_batches(
        Model, batch_size=8, num_cpus=1, compute=ray.data.ActorPoolStrategy(size=2)
    ).take_all()
    assert len(rows) == 128
    inside.append(all(row["actor"] == row["decoder"] for row in rows))
    print(f"{name}: decoded {'inside' if inside[-1] else 'beside'} the actors")
assert inside == [True, False, False]
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "ray[data]==2.60.0" numpy==2.3.4 pandas==3.0.0 pyarrow==22.0.0
"$folder/env/bin/python" "$folder/probe.py" 2>/dev/null
