"""Processes that start quickly because they are forked from a server that has imported torch, Lightning and lkd.

Importing them takes several seconds. The server is started once, trains nothing, and has no threads.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lkd.callbacks", "lkd.cli.main", "lkd.datamodules", "lkd.losses", "lkd.modules"])


class Done(NamedTuple):
    """Result of a process.

    Args:
        code: Exit code; negative: the signal that ended the process.
        stdout: Contents of its standard output.
        stderr: Contents of its standard error.
    """

    code: int
    stdout: str
    stderr: str


class Forked:
    """A process that calls a function in the current folder, with its own output and environment.

    `Forked(module, "lkd", "fit")` replaces a process of `python -m lkd fit`.

    Args:
        function: The function, such as `module` or `script`; it is pickled.
        args: Its arguments.
        environment: Variables in addition to those of this process.
    """

    def __init__(self, function: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        variables = {**os.environ, **(environment or {})}
        self._process = CONTEXT.Process(target=_work, args=(function, args, str(Path.cwd()), variables, self._files))
        self._process.start()

    @property
    def is_alive(self) -> bool:
        """Whether the process is running."""
        return self._process.is_alive()

    def send(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(int(self._process.pid or 0), number)

    def wait(self, seconds: float = 300) -> Done:
        """Wait until the process ends.

        Raises:
            TimeoutError: If the process is still running after `seconds`; it is killed.
        """
        self._process.join(seconds)
        late = self._process.exitcode is None
        self._process.kill()
        self._process.join()
        done = Done(int(self._process.exitcode or 0), *(file.read_text() for file in self._files))
        self._folder.cleanup()
        if late:
            raise TimeoutError(f"the process has not ended after {seconds} seconds: {done}")
        return done


def ranks(number: int, function: Callable[..., Any], *args: Any) -> list[Done]:
    """Run a function in several processes with the environment that `torchrun` sets, and wait for all.

    Args:
        number: Number of processes.
        function: The function.
        args: Its arguments, the same in all processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(number), "NODE_RANK": "0"}
    started = [Forked(function, *args, environment={**shared, "LOCAL_RANK": str(rank)}) for rank in range(number)]
    return [process.wait() for process in started]


def module(name: str, *args: str) -> None:
    """Run `python -m NAME ARGS` in this process."""
    sys.argv = [name, *args]
    sys.path.insert(0, str(Path.cwd()))
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def script(path: str, *args: str) -> None:
    """Run `python PATH ARGS` in this process."""
    sys.argv = [path, *args]
    sys.path.insert(0, str(Path(path).resolve().parent))
    runpy.run_path(path, run_name="__main__")


def _work(
    function: Callable[..., Any], args: Sequence[Any], folder: str, variables: dict[str, str], files: Sequence[Path]
) -> None:
    gc.freeze()  # garbage collection skips imported objects, so their memory stays shared
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for number, file in enumerate(files, start=1):
        with file.open("w") as opened:
            os.dup2(opened.fileno(), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    multiprocessing.set_start_method(None, force=True)  # the default method, as in an ordinary process
    function(*args)
