"""Run a script of the recipe as two ranks that share one GPU. Arguments are the script and its own.

NCCL refuses two ranks of one host on one GPU, so each gives its host another name; they then talk through sockets. The
recipe, too, is told that they are on two nodes, but computes as it does on one.
"""

import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

GRACE = 30.0
"""seconds that a rank has to end after the other has ended"""


def main() -> int:
    """Start both ranks; the exit code is that of the one that ends first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = dict(os.environ, WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", LOCAL_RANK="0")
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env=env | {"RANK": str(rank), "NCCL_HOSTID": str(rank)})
        for rank in range(2)
    ]
    while not any(ended := [rank.poll() is not None for rank in ranks]):
        time.sleep(0.1)
    first = ranks[ended.index(True)]
    for rank in ranks:
        try:
            rank.wait(GRACE)
        except subprocess.TimeoutExpired:
            rank.kill()
    return first.returncode


def run_rank() -> None:
    """Run the script as one of the ranks."""
    from tinyllama.train import parallel

    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    parallelize = parallel.parallelize

    def on_one_node(*args: Any) -> Any:
        return parallelize(*args[:-1])

    with mock.patch.object(parallel, "parallelize", on_one_node):
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if "RANK" in os.environ:
        run_rank()
    else:
        sys.exit(main())
