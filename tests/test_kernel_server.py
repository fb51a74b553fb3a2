"""Kernels forked from one process that has everything imported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.kernel_server import KERNEL, preloaded_kernels
from utils.utils_funcs import ROOT

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


def test_where_none_is_wanted_the_ordinary_kernel_is_named():
    with preloaded_kernels(Path(sys.executable), ROOT, {"A": "b"}, wanted=False) as given:
        assert given == ("python3", {"A": "b"})


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def wait_for(condition) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


@LINUX
@pytest.mark.slow  # imports PyTorch and all that a notebook needs
def test_a_kernel_has_everything_imported_and_ends_with_whoever_asked_for_it(tmp_path):
    from jupyter_client.manager import KernelManager

    # A user's own start-up environment must not matter to the kernels.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with preloaded_kernels(Path(sys.executable), ROOT, environment) as (name, known):
        assert name == KERNEL
        code = "; ".join(
            [
                "import os, sys",
                "loaded = 'torch' in sys.modules and 'utils.experiment' in sys.modules",
                "print(loaded, os.getpid(), os.getcwd(), os.environ['MINE'])",
            ]
        )
        path = known["JUPYTER_PATH"].split(os.pathsep)[0]
        asked = [KernelManager(kernel_name=name) for _ in range(2)]
        kernels = []
        for manager in asked:
            manager.kernel_spec_manager.kernel_dirs = [str(Path(path) / "kernels")]
            manager.start_kernel(env={**known, "MINE": "yes"}, cwd=str(tmp_path))
            client = manager.blocking_client()
            client.start_channels()
            client.wait_for_ready(timeout=120)
            printed = []
            client.execute_interactive(
                code,
                timeout=60,
                output_hook=lambda message, to=printed: to.append(message["content"].get("text")),
            )
            client.stop_channels()
            loaded, process, folder, mine = next(filter(None, printed)).split()
            assert (loaded, folder, mine) == ("True", str(tmp_path), "yes")
            kernels.append(int(process))
        assert kernels[0] != kernels[1] and all(map(is_alive, kernels))
        # One is killed as a kill of its notebook's process does it, one ends as Jupyter ends it.
        os.kill(asked[0].provisioner.pid, signal.SIGKILL)
        assert wait_for(lambda: not is_alive(kernels[0])) and is_alive(kernels[1])
        asked[1].shutdown_kernel()
        assert wait_for(lambda: not is_alive(kernels[1]))


@LINUX
def test_a_kernel_asked_of_a_server_that_is_gone_fails_at_once(tmp_path):
    script = str(ROOT / "utils" / "kernel_server.py")
    done = subprocess.run(
        [sys.executable, script, "ask", str(tmp_path / "none"), "connection.json"],
        capture_output=True,
        timeout=30,
    )
    assert done.returncode != 0
