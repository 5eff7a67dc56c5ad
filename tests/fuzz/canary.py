"""Detect executed code: the payload leaves a mark, and an audit hook records other processes and calls."""

from __future__ import annotations

import sys

_FORBIDDEN = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "pty.spawn",
    "subprocess.Popen",
    "socket.connect",
    "shutil.rmtree",
    "os.putenv",
}
# Command with which jsonargparse locates the stubs of classes without annotations; it does not depend on any file.
_STUBS = [sys.executable, "-c", "import sys, json; print(json.dumps(sys.path))"]
heard: list[str] = []
_listening = False


def ring(*_: object) -> None:
    """Record that the payload ran."""
    heard.append("canary")


def listen(on: bool) -> None:
    """Start or stop recording events."""
    global _listening
    _listening = on


def install() -> None:
    """Install the audit hook, once per process; a hook cannot be removed."""
    sys.addaudithook(_hear)


def _hear(event: str, args: tuple[object, ...]) -> None:
    if _listening and event in _FORBIDDEN and not (event == "subprocess.Popen" and args[1] == _STUBS):
        heard.append(event)
