#!/usr/bin/env bash
# A distributed checkpoint holds BatchNorm statistics of several processes, each norm's of another one.
#
# Guess: under DistributedDataParallel torch.distributed.checkpoint saves buffers, which no process shards, from process 0,
# as torch.save there would; so all norms of a checkpoint have the statistics of the same images.
# Seen (torch 2.13.0, gloo, 2 processes): buffers differ between processes behind a step, and what is saved of a tensor
# that all have is shared out among them to balance the writing: some norms' statistics are process 0's, others' are 1's.
#
#   norm: process that its saved mean is of
#   0: 0  1: 1  2: 0  3: 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/probe.py" <<'PY'
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

warnings.simplefilter("ignore")
dist.init_process_group("gloo")
rank = dist.get_rank()
model = nn.Sequential(*(nn.BatchNorm1d(8, momentum=1.0) for _ in range(4)))
ddp = nn.parallel.DistributedDataParallel(model)
ddp(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) + rank).sum().backward()
own = [norm.running_mean.clone() for norm in model]
dcp.save({"model": model.state_dict()}, checkpoint_id=sys.argv[1])
state = {"model": nn.Sequential(*(nn.BatchNorm1d(8) for _ in range(4))).state_dict()}
dcp.load(state, checkpoint_id=sys.argv[1])
is_own = torch.tensor([torch.equal(state["model"][f"{i}.running_mean"], own[i]) for i in range(4)], dtype=torch.int64)
every = [torch.zeros_like(is_own) for _ in range(2)]
dist.all_gather(every, is_own)
if rank == 0:
    owners = [[r for r in range(2) if every[r][i]] for i in range(4)]
    print("  ".join(f"{i}: {' '.join(map(str, found))}" for i, found in enumerate(owners)))
    assert sorted({r for found in owners for r in found}) == [0, 1]
dist.destroy_process_group()
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.3.4
"$folder/env/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 "$folder/probe.py" "$folder/saved" 2>/dev/null
