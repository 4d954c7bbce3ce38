"""Processes that run all cases in one go: starting them takes longer than most cases."""

import importlib
import json
import os
import socket
import sys
import tempfile
import traceback
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def _run(rank, port, module, folder, world):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    outcome = Path(folder) / f"{rank}.json"
    results = {}
    for name, case in importlib.import_module(module).CASES.items():
        torch.manual_seed(rank)
        last = case is getattr(importlib.import_module(module), "LAST", None)
        if last:  # a process that dies in it has no other fault
            outcome.write_text(json.dumps({**results, name: ""}))
        try:
            with tempfile.TemporaryDirectory() if rank == 0 else nullcontext() as own:
                shared = [own]
                dist.broadcast_object_list(shared)
                case(rank, Path(shared[0]))
                if not last:
                    dist.barrier()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        outcome.write_text(json.dumps(results))
        if results[name]:
            sys.stderr.write(f"rank {rank}: {name}: {results[name]}")
        if results[name] or last:
            os._exit(0)  # the other rank may wait for this one: its cases end here, too
    dist.destroy_process_group()


def outcomes(module, folder, world=WORLD):
    """What every rank says of every case: nothing for a case that passed, else its traceback.

    A case after one that failed was not run.

    Args:
        module: has ``CASES``, functions of (rank, a folder that all see) by name. One that ends a
            process is the last and stands in ``LAST``, too.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_run, (port, module, str(folder), world), nprocs=world)
    return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def gathered(tensor):
    """A tensor of every rank."""
    tensor = tensor.detach().contiguous()
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    return found


def alone():
    """A process group of this rank alone: for the one process that others are compared with."""
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)
