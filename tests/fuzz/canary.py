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
    sys.addaudithook(lambda event, args: heard.append(event) if _listening and event in _FORBIDDEN else None)
