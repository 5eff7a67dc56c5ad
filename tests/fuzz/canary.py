"""What a hostile file would have run: it leaves a mark, and the audit hook hears what else is started."""

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
# How jsonargparse finds the stubs of a class whose arguments have no types: nothing in it comes from a file.
_STUBS = [sys.executable, "-c", "import sys, json; print(json.dumps(sys.path))"]
heard: list[str] = []
_listening = False


def ring(*_: object) -> None:
    """The payload."""
    heard.append("canary")


def listen(on: bool) -> None:
    """From now on, or no longer."""
    global _listening
    _listening = on


def install() -> None:
    """Once in a process; a hook cannot be taken away."""
    sys.addaudithook(_hear)


def _hear(event: str, args: tuple[object, ...]) -> None:
    if _listening and event in _FORBIDDEN and not (event == "subprocess.Popen" and args[1] == _STUBS):
        heard.append(event)
