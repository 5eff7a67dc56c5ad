"""What the commands answer to `--help`: plain text, that needs no torch."""

from __future__ import annotations

from lkd import __version__

OWN = {"layers": "lkd.listing", "compare": "lkd.compare", "sweep": "lkd.sweep", "export": "lkd.export"}
"""The commands that are not Lightning's: each one's module, whose `main` gets the arguments behind the command."""
COMMANDS = ("fit", "validate", "test", "predict", *OWN)

HELP = f"""\
lkd {__version__}: make small image classifiers learn from large ones

usage: lkd COMMAND --config FILE [--config OVERLAY ...] [--KEY VALUE ...]

commands
  fit        train a network, alone or from a teacher
  validate   measure a checkpoint on the validation images
  test       measure a checkpoint on the test images
  predict    write a checkpoint's predictions for the test images
  layers     print the layers of a network that a criterion can read
  compare    measure several checkpoints and networks on the same images
  sweep      search temperature, weights, and any other setting
  export     write a checkpoint's network for use without lkd

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

OWN_HELP = {
    "layers": """\
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
""",
    "compare": "",
    "sweep": "",
    "export": "",
}
"""The whole answer of `lkd COMMAND --help`."""
