"""Two processes on this machine, for tests of distributed runs."""

import os
import socket
import warnings
from pathlib import Path

import torch
import torch.multiprocessing

WORLD = 2


def on_two_processes(work, folder, *, timeout=400):
    """What ``work(rank, path)`` left under ``path`` on each of two ranks; one that is not done in time is ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    paths = [Path(folder) / f"rank{rank}.pt" for rank in range(WORLD)]
    processes = [context.Process(target=_start, args=(work, *args, port), daemon=True) for args in enumerate(paths)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=timeout)
        if process.is_alive():
            process.kill()
    return [torch.load(path) for path in paths]


def _start(work, rank, path, port):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(WORLD), NODE_RANK="0", LOCAL_RANK=str(rank)
    )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    work(rank, path)
    os._exit(0)  # without waiting for a rank that is stuck in a collective
