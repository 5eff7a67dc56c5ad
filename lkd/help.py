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
    "sweep": """\
usage: lkd sweep --config FILE [--config OVERLAY ...] --space FILE [--trials N] [--KEY VALUE ...]

Search settings of lkd fit: each trial is a run of it, in this process, with settings from the space. Its value is that
of its best checkpoint: the largest val/acc, unless --monitor says otherwise. The same command again goes on where it
was interrupted, however it ended; begun twice at once, on one machine, both share the work.

  lkd sweep --config digits/kd --space sweep/temperature_weight --trials 20
  lkd sweep --config digits/kd --space sweep/temperature_weight_grid --sampler grid --teacher_cache.versions 1
  lkd sweep --config digits/kd --space.model.init_args.optimizer.init_args.lr '{low: 0.01, high: 1, log: true}'

  --space FILE         settings by their names in a config, each with a list of choices or a range; several add up
                         model.init_args.distill_weight: [0.1, 0.5, 0.9]
                         model.init_args.criterion.init_args.temperature: {low: 1, high: 16, log: true}
                         data.init_args.batch_size: {low: 32, high: 128, step: 32}
  --space.KEY VALUE    the same for one setting, over the files'
  --trials N           how many there are to be in all: 20 by default; of a grid, all its cells
  --sampler NAME       tpe (the default; Bayesian: what did well is tried more), random, grid
  --sampler_seed N     what it draws from, 0 by default; every trial is trained with the config's seed_everything
  --pruner NAME        none (the default), median, halving, hyperband: give hopeless trials up early
  --monitor NAME       the curve whose best point is a trial's value, as --checkpoint.monitor; of a loss, the least
  --study NAME         the folder beside version_0, version_1, ...: 'sweep' by default; another search needs another one
  --storage PLACE      where the study is kept: a URL as Optuna takes it (postgresql://...), by which machines share the
                       work; a file, SQLite if it ends in .db, else a journal; by default study.db in its folder
  --take_over N ...    take up trials that another machine has left, once nobody works at them any more
  --give_up N ...      take up trials no more, as they end their process each time (for want of memory?): they failed
  --KEY VALUE          any setting of lkd fit

In the study's folder lie best.yaml (the best trial's config, for lkd fit), trials.csv, study.html, and trial_0000, ...
with checkpoints, curves and log.txt. Each trial uses one device; for several begin the command once for each:

  CUDA_VISIBLE_DEVICES=0 lkd sweep ... & CUDA_VISIBLE_DEVICES=1 lkd sweep ... & wait
""",
    "export": "",
}
"""The whole answer of `lkd COMMAND --help`."""
