"""The `lkd` command. Answers that need no torch are given here, before anything heavy is imported."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from lkd import __version__
from lkd.help import COMMANDS, HELP, OWN_HELP


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments behind `lkd`; None: this process's.

    Returns:
        The exit code: 0, or 2 after a mistake that the user can mend.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if args[0] in OWN_HELP and {"-h", "--help"} & set(args):
        print(OWN_HELP[args[0]], end="")
        return 0
    if args[0] == "--version":
        print(f"lkd {__version__}")
        return 0
    if args[0] not in COMMANDS:
        nearest = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; the commands are {', '.join(COMMANDS)}"
        print(f"lkd: error: there is no command {args[0]!r}{hint}", file=sys.stderr)
        return 2
    from lkd.cli import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
