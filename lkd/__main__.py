"""The `lkd` command. Answers that need no torch are given here, before anything heavy is imported."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from lkd import __version__

_COMMANDS = ("fit", "validate", "test", "predict", "layers")

_HELP = f"""\
lkd {__version__}: make small image classifiers learn from large ones

usage: lkd COMMAND --config FILE [--config OVERLAY ...] [--KEY VALUE ...]

commands
  fit        train a network, alone or from a teacher
  validate   measure a checkpoint on the validation images
  test       measure a checkpoint on the test images
  predict    write a checkpoint's predictions for the test images
  layers     print the layers of a network that a criterion can read

The first steps
  lkd fit --config configs/digits/kd.yaml                   a student learns from a teacher, in less than a minute
  lkd test --ckpt_path runs/.../checkpoints/best.ckpt       the run's own config.yaml is taken

Options
  --config FILE        a file of settings; later ones, and --KEY VALUE, go over earlier ones. lkd's own lie in configs/
  --resume             fit: go on with the newest run of that name, if it was interrupted; else begin
  --ckpt_path FILE     a checkpoint to continue from (fit) or to measure; last, best: the newest run's
  --teacher_cache.versions N   ask the teacher once for each of N augmented versions of an image, and keep what it says
  --KEY VALUE          any setting, as in --model.init_args.distill_weight 0.5 or --trainer.max_epochs 10
  --print_config       print all settings and stop
  --debug              show the whole traceback of an error (also: LKD_DEBUG=1)
  --help, --version    'lkd COMMAND --help' tells all settings; with --model.help CLASS, those of a class
"""

_LAYERS_HELP = """\
usage: lkd layers CLASS_PATH [--KEY VALUE ...] [--input_size SIZE]
       lkd layers --config FILE [--config OVERLAY ...] [--KEY VALUE ...] [--input_size SIZE]

The layers of a network, or of a run's student and teacher, that can be named in a criterion's student_layers and
teacher_layers, with the shapes of what they return and the groups (@stages, @pooled, ...) that they are in.

  lkd layers lkd.models.resnet20 --num_classes 10
  lkd layers lkd.models.timm_model --name vit_tiny_patch16_224 --num_classes 10 --input_size 224
  lkd layers my_net.Net                                      my_net.py in the current folder
  lkd layers --config configs/digits/kd.yaml

  --input_size SIZE    224, or height and width (64 48), or channels too (3 64 48); without it, the data's size if a
                       config names the data, else 32
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments behind `lkd`; None: this process's.

    Returns:
        The exit code: 0, or 2 after a mistake that the user can mend.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if args[0] == "layers" and {"-h", "--help"} & set(args):
        print(_LAYERS_HELP, end="")
        return 0
    if args[0] == "--version":
        print(f"lkd {__version__}")
        return 0
    if args[0] not in _COMMANDS:
        nearest = difflib.get_close_matches(args[0], _COMMANDS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; the commands are {', '.join(_COMMANDS)}"
        print(f"lkd: error: there is no command {args[0]!r}{hint}", file=sys.stderr)
        return 2
    from lkd.cli import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
