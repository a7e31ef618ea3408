"""One training step in several processes, under DistributedDataParallel or fully_shard; run by torchrun:

    torchrun --nproc_per_node 2 tests/distributed_steps.py FOLDER

or as processes that say their RANK and WORLD_SIZE and name a file to meet at, which asks nothing of a machine's names
and ports: ``tests/distributed_steps.py FOLDER FILE``. Each process takes its share of one batch. What comes out is a
checkpoint of torch.distributed.checkpoint for each model and way, ``FOLDER/<way>-<model>``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from model_helpers import images, randomise, tiny_vit
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import repavit_ops
from repavit_ops.models import JoinedVisionTransformer

PROCESSES = 2
WAYS = ("ddp", "fsdp2")


def idle() -> nn.Module:
    """RePaViT's training form, its BatchNorms in training."""
    return tiny_vit().double().train()


def joined() -> nn.Module:
    """Joined branches at α = 1, where they can be merged."""
    config = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    model = randomise(JoinedVisionTransformer(**config, branches=2))
    repavit_ops.set_join(model, 1.0)
    return model.double().train()


MODELS = {"idle": idle, "joined": joined}


def share(rank: int) -> tuple[Tensor, Tensor]:
    """Images and labels of one process."""
    x, y = images(4 * PROCESSES).double(), torch.arange(4 * PROCESSES) % 10
    return x[rank::PROCESSES], y[rank::PROCESSES]


def loss_of(model: nn.Module, rank: int) -> Tensor:
    x, y = share(rank)
    return nn.functional.cross_entropy(model(x), y)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def main(folder: Path, meeting: str | None = None) -> None:
    if meeting is None:
        dist.init_process_group("gloo")
    else:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", store=dist.FileStore(meeting, size), rank=rank, world_size=size)
    rank = dist.get_rank()
    torch.set_num_threads(1)
    for way in WAYS:
        for name, build in MODELS.items():
            model = build()
            if way == "ddp":
                trained: nn.Module = DistributedDataParallel(model)
            else:
                for block in model.blocks:
                    fully_shard(block)
                trained = fully_shard(model)
            optimizer = optimizer_of(trained)
            loss_of(trained, rank).backward()
            optimizer.step()
            dcp.save({"model": get_model_state_dict(trained)}, checkpoint_id=folder / f"{way}-{name}")
    dist.barrier()  # nobody leaves while another still waits for an answer
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
