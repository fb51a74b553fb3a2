"""Jupyter kernels that start with everything imported: forks of one process that imported it.

Importing PyTorch and what belongs to it costs each notebook ten seconds of a processor, a third of
what a notebook of a demo does. So `reproduce.py` starts one server for all of them, on Linux:

    python -m utils.kernel_server serve DESCRIPTOR PARENT    imports once, forks a kernel on request
    python utils/kernel_server.py ask SOCKET CONNECTION_FILE   what Jupyter starts as a kernel

The second asks the first for a kernel and lives as long as that kernel does; either one's end ends
the other, because the connection between them breaks. Standard library only, so that the second
starts in a hundredth of a second.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

#: What the server imports. The last ones would otherwise be imported in the middle of a notebook.
PRELOADED = (
    "ipykernel.kernelapp",
    "utils.experiment",
    "utils.diagnosis",
    "utils.report",
    "utils.grad_cam",
    "utils.audit.page",
    "utils.report.scans_and_ensembles",
    "matplotlib.pyplot",
    "torchattacks",
    "torch._dynamo",
)
#: The name of the kernel that `ask` is.
KERNEL = "preloaded"


@contextlib.contextmanager
def preloaded_kernels(
    python: Path, root: Path, environment: dict[str, str], wanted: bool = True
) -> Iterator[tuple[str, dict[str, str]]]:
    """Starts a server and yields the name of its kernel and the environment that knows this name.

    Where it is not wanted, or processes cannot be forked safely (all systems but Linux), it yields
    the ordinary kernel and the environment as it is.

    Args:
        python: the interpreter of the kernels.
        root: the repository.
        environment: variables of the server and so of every kernel.
        wanted: false for notebooks that compute for hours.
    """
    if not wanted or sys.platform != "linux":
        yield "python3", environment
        return
    # A socket's address may have 108 characters, so it lies in a folder of a short name.
    with tempfile.TemporaryDirectory(prefix="kernels") as folder:
        address = str(Path(folder) / "socket")
        specification = Path(folder) / "jupyter" / "kernels" / KERNEL / "kernel.json"
        specification.parent.mkdir(parents=True)
        ask = [str(python), "-I", "-S", str(Path(__file__).resolve()), "ask", address]
        specification.write_text(
            json.dumps(
                {
                    "argv": [*ask, "{connection_file}"],
                    "display_name": KERNEL,
                    "language": "python",
                }
            ),
            encoding="utf-8",
        )
        # Listening before the server runs, so that a kernel asked for meanwhile waits.
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            descriptor = listener.fileno()
            module = ["-m", "utils.kernel_server", "serve", str(descriptor), str(os.getpid())]
            server = subprocess.Popen(
                [str(python), *module],
                cwd=root,
                env=environment,
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        places = [str(Path(folder) / "jupyter"), environment.get("JUPYTER_PATH", "")]
        try:
            yield KERNEL, {**environment, "JUPYTER_PATH": os.pathsep.join(filter(None, places))}
        finally:
            server.terminate()
            server.wait()


def serve(descriptor: int, parent: int) -> None:
    """Imports everything, then forks a kernel for every connection, until the parent has ended."""
    with socket.socket(fileno=descriptor) as listener:
        for name in PRELOADED:
            importlib.import_module(name)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries the kernels
        listener.settimeout(0.5)
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                with connection:
                    if os.fork() == 0:
                        listener.close()
                        become_kernel(connection)


def become_kernel(connection: socket.socket) -> None:
    """Turns this forked process into the kernel that the other end of `connection` asks for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(None)
    wanted = json.loads(connection.makefile("r", encoding="utf-8").readline())
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["folder"])
    threading.Thread(target=end_with, args=(connection,), daemon=True).start()

    from ipykernel.kernelapp import IPKernelApp

    # Errors only: it would warn of the unencrypted connection to Jupyter on this machine.
    IPKernelApp.launch_instance(argv=["-f", wanted["connection_file"], "--log-level=40"])
    os._exit(0)


def end_with(connection: socket.socket) -> None:
    """Waits until the other end of `connection` is closed, then ends this process."""
    connection.recv(1)
    os._exit(1)


def ask(address: str, connection_file: str) -> None:
    """Asks the server at `address` for a kernel, and returns when that kernel has ended."""
    # The kernel watches this process by the connection, not by the number of its parent.
    environment = {name: text for name, text in os.environ.items() if name != "JPY_PARENT_PID"}
    wanted = {
        "environment": environment,
        "folder": os.getcwd(),
        "connection_file": os.path.abspath(connection_file),
    }
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        server.sendall(json.dumps(wanted).encode() + b"\n")
        parent = os.getppid()
        server.settimeout(1)
        while os.getppid() == parent:  # Jupyter killed without a word
            try:
                server.recv(1)
            except TimeoutError:
                continue
            break


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]), int(sys.argv[3]))
    else:
        ask(sys.argv[2], sys.argv[3])
