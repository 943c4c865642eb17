"""Run a function in several processes of one machine, as ranks of a process group."""

import os
import socket
import sys

import torch


def on_ranks(function, count: int, *arguments) -> None:
    """Run `function(rank, port, *arguments)` in `count` processes with one thread each. Raise an error of a process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Importing torch and TRL again in each process takes longest, so fork. Autograd with a GPU cannot be forked.
    method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(_start, (function, count, port, arguments), nprocs=count, start_method=method)


def _start(rank: int, function, count: int, port: int, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                   "LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    torch.set_num_threads(1)
    if "accelerate" in sys.modules:  # a fork inherits its parent's state of one process
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    function(rank, port, *arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
