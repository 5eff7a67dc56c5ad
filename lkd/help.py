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
    "export": """\
usage: lkd export CHECKPOINT [--format FORMATS] [--output FOLDER] [--int8] [--license ID] [--KEY VALUE ...]

A trained network as files that need no lkd. CHECKPOINT is a file, a run's folder, or that of all runs of one name, for
the newest one's best. Each file is read again and answers the run's test images: one that differs from the checkpoint
by more than 1e-4 in any logit is an error, and nothing is left. Beside the files lie preprocessing.json (which is in
each of them, too) and a model card, README.md, with the code to use them.

  lkd export runs/digits/kd
  lkd export runs/digits/kd --format onnx --int8 --output digits_onnx --license apache-2.0

  --format FORMATS     safetensors (weights), torch (a program for torch.export.load), onnx; several with commas
                       between; all three if not given. onnx needs pip install 'lkd[onnx]'
  --output FOLDER      where to; if not given, export in the run's folder
  --overwrite          replace an export that is there
  --int8               an ONNX file of 8 bits as well, calibrated on training images; it is measured, not held to 1e-4
  --license ID         the license that the card states, as Hugging Face calls it; unknown if not given
  --images N           compare on at most N test images, evenly spread (10000)
  --KEY VALUE          a change of the run's settings, as --data.init_args.root FOLDER where the images have moved

From Python: lkd.export.export("runs/digits/kd", formats=["onnx"])
""",
}
"""The whole answer of `lkd COMMAND --help`."""
