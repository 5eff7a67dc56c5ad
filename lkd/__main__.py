"""The `lkd` command. Help and early checks run before torch and Lightning are imported."""

from __future__ import annotations

import difflib
import gc
import os
import sys
from collections.abc import Callable, Sequence

from lkd.__about__ import __version__
from lkd.cli.catalogue import SECTIONS, homes_of, listed
from lkd.cli.early_checks import check
from lkd.cli.help import COMMANDS, HELP, OWN_HELP, SETTINGS, settings_help


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after `lkd`. `None` uses those of this process.

    Returns:
        Exit code: 0 on success, 2 after a user error, 130 after Ctrl-C, 141 if the reader of the output has closed it,
        or the exit code of the command (`lkd.cli.main.run`).
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if (text := _help_or_version(args)) is not None:
            print(text, end="", flush=True)
            return 0
        if _asks_for_all(args):
            args = [args[0], "--help"]  # handled by the parser
        else:
            check([arg for arg in args if arg != "--debug"])
    except BrokenPipeError:
        return _closed()
    except (ValueError, OSError) as error:
        print(f"lkd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        code = _imported(is_whole_process=argv is None)(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _closed()
    except KeyboardInterrupt:
        if "--debug" in args:
            raise
        print("lkd: interrupted", file=sys.stderr)
        return 130


def _imported(is_whole_process: bool) -> Callable[[Sequence[str]], int]:
    """Import torch, Lightning and the commands without collecting garbage, which would take a tenth of the time.

    Args:
        is_whole_process: Whether the process runs only lkd. Later collections then skip all existing objects.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        from lkd.cli.main import run
    finally:
        if is_whole_process:
            gc.freeze()
        if was_enabled:
            gc.enable()
    return run


def _asks_for_all(args: Sequence[str]) -> bool:
    """Return whether the arguments are `COMMAND --help all`."""
    return args[0] in SETTINGS and list(args[1:]) in (["--help", "all"], ["--help=all"], ["-h", "all"])


def _help_or_version(args: Sequence[str]) -> str | None:
    """Return the text for a help or version option; None if there is a command to run.

    Raises:
        ValueError: If there is no such command or class.
    """
    if not args or args[0] in ("-h", "--help", "help"):
        return HELP
    command, options = args[0], args[1:]
    if command == "--version":
        return f"lkd {__version__}\n"
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; available commands: {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {command!r}{hint}")
    if command in OWN_HELP and {"-h", "--help"} & set(options):
        return OWN_HELP[command]
    return _help(command, options) if command in SETTINGS else None


def _help(command: str, options: Sequence[str]) -> str | None:
    """Return the text for `--help`, `--model.help` and `--model.help CLASS`; None without these options."""
    if _asks_for_all([command, *options]):
        return None
    for option, following in zip(options, [*options[1:], ""], strict=True) if options else ():
        name, equals, value = option.partition("=")
        value = value if equals else "" if following.startswith("-") else following
        if name in ("-h", "--help"):
            return settings_help(command)
        if name.startswith("--") and name.endswith(".help"):
            setting = name[2:].removesuffix(".help")
            homes = homes_of(setting)
            if kind := value or SECTIONS.get(setting):
                from lkd.cli.class_help import class_help

                return class_help(kind, homes)
            if homes:
                lines = [line for home in homes for line in listed(home)]
                return "\n".join([*lines, "", f"lkd {command} {name} CLASS describes the settings of a class", ""])
    return None


def _closed() -> int:
    """Return the exit code of a command whose output is no longer read, as in `lkd layers ... | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout on exit
    return 141  # as a shell reports SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
