"""What the commands answer to `--help`: plain text, that needs no torch."""

from __future__ import annotations

from lkd.__about__ import __version__
from lkd.cli.catalogue import indented, listed, summaries

OWN = {"layers": "lkd.cli.layers", "compare": "lkd.compare", "sweep": "lkd.sweep", "export": "lkd.export"}
"""The commands that are not Lightning's: each one's module, whose `main` gets the arguments behind the command."""
SETTINGS = ("fit", "validate", "test", "predict")
"""The commands that take the settings of a run."""
COMMANDS = (*SETTINGS, *OWN)

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
  --resume             fit: continue the newest run of that name from its last checkpoint; begin if there is none
  --name NAME          the run's name: its folder is runs/NAME/version_N
  --seeds N            fit: N runs with the seeds 0 to N-1 (or --seeds 0,1,2), and the mean and standard deviation of
                       their results; with --resume, runs that are done are kept and the others continue
  --ckpt_path FILE     a checkpoint to continue from (fit) or to measure; last, best: the newest run's
  --teacher_cache.versions N   ask the teacher once for each of N augmented versions of an image, and keep what it says
  --images FOLDER      predict: all images in a folder, in place of the test images
  --KEY VALUE          any setting, as in --model.init_args.distill_weight 0.5 or --trainer.max_epochs 10
  --print_config       print all settings and stop
  --debug              show the whole traceback of an error (also: LKD_DEBUG=1)
  --help, --version    'lkd COMMAND --help' describes a command, 'lkd fit --model.help CLASS' a class
"""

_FIT = """\
usage: lkd fit --config FILE [--config OVERLAY ...] [--KEY VALUE ...]

Train a network, alone or from a teacher. --resume continues the newest run.

Modules (--model CLASS)
{modules}

Data (--data CLASS)
{data}

Criteria (--model.init_args.criterion CLASS)
{criteria}

Settings that most runs change
  --model.init_args.teacher_ckpt FILE       the teacher's weights
  --model.init_args.distill_weight 0.9      weight of the criterion
  --model.init_args.hard_weight 0.1         weight of the cross-entropy
  --model.init_args.optimizer.init_args.lr 0.05
  --data.init_args.batch_size 128           also root, num_workers, augment, ...
  --trainer.max_epochs 240                  also devices, precision, ...
  --seed_everything 0                       the seed
  --name NAME                               the run's folder

More help
  lkd fit --model.help                      one line for each module
  lkd fit --data.help                       ... for each data module
  lkd fit --criterion.help                  ... criterion; also optimizer,
                                            lr_scheduler, callbacks, trainer
  lkd fit --model.help CLASS                the settings of a class
  lkd fit --config FILE --print_config
  lkd fit --help all                        all settings (long)
"""

_MEASURE = """\
usage: lkd {command} --ckpt_path FILE [--config FILE ...] [--KEY VALUE ...]

{what}
Without --config, the config.yaml of the checkpoint's run is used.

{examples}

Options
  --ckpt_path FILE     a checkpoint, or a run's folder (its best); best or last
                       with --name NAME: that of the newest run of this name
  --config FILE        a config, as for lkd fit
{options}  --data.init_args.root FOLDER          the images, if they have moved
  --data.init_args.batch_size 256       also num_workers, ...
  {limit:38}only some batches
  --trainer.devices 1                   also accelerator, precision, ...
  --model.init_args.model_ckpt FILE     someone else's weights, with a --config and
                                        without --ckpt_path; for a DistillModule
                                        student_ckpt and teacher_ckpt

More help
  lkd fit --help                        modules, data and criteria
  {all:38}all settings (long)
"""
_MEASURED = {
    "validate": (
        "Measure a checkpoint on the validation images.",
        "  lkd validate --ckpt_path runs/digits/kd/version_0/checkpoints/best.ckpt",
        "",
    ),
    "test": (
        "Measure a checkpoint on the test images.",
        "  lkd test --ckpt_path runs/digits/kd/version_0/checkpoints/best.ckpt\n"
        "  lkd test --ckpt_path best --name digits/kd",
        "",
    ),
    "predict": (
        "Write a checkpoint's predictions for the test images, or for new images, to\npredictions.csv.",
        "  lkd predict --ckpt_path runs/digits/kd/version_0/checkpoints/best.ckpt\n"
        "  lkd predict --ckpt_path best --name digits/kd --images FOLDER",
        "  --images FOLDER      all images in a folder, in place of the test images\n",
    ),
}


def settings_help(command: str) -> str:
    """Return the answer to `lkd fit --help`, and to that of the commands that measure a checkpoint."""
    if command in _MEASURED:
        what, examples, options = _MEASURED[command]
        limit = f"--trainer.limit_{'val' if command == 'validate' else command}_batches 10"
        texts = {"what": what, "examples": examples, "options": options, "limit": limit}
        return _MEASURE.format(command=command, all=f"lkd {command} --help all", **texts)
    data = [name.removesuffix("DataModule") for name in summaries("lkd.datamodules")]
    return _FIT.format(
        modules="\n".join(listed("lkd.modules")),
        data=indented(f"{', '.join(data)} (each followed by DataModule)"),
        criteria=indented(", ".join(summaries("lkd.losses"))),
    )


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
    "compare": """\
usage: lkd compare [NAME=]RUN ... [--config FILE] [--KEY VALUE ...]

Measure checkpoints and networks on the same images: accuracy with 95 % intervals, negative log-likelihood, calibration,
agreement with the teacher, accuracy of each class, parameters, operations, size, latency and throughput on this device.
Runs that differ only by seed form one row: mean, standard deviation, n, and 95 % interval over the seeds. Welch's
t-test compares two such methods; McNemar's test compares two trained networks. Tables in the terminal; a page,
Markdown, JSON and TensorBoard's curves in a folder of their own.

  lkd compare runs/digits/kd alone=runs/digits/student       the teacher of the first run is measured, too
  lkd compare distilled=runs/cifar10/kd --config others.yaml
  lkd compare runs/digits/kd/version_* runs/digits/student/version_*     seeds, as of lkd fit --seeds 5

  RUN                 a checkpoint; a run's folder, or that of all runs of one name, for the newest one's best
  --config FILE       networks of others, the data, and any of the settings below:
                        networks:
                          theirs:
                            class_path: lkd.models.load_weights
                            init_args: {network: {class_path: lkd.models.resnet20, init_args: {num_classes: 10}},
                                        path: theirs.pth}
                        normalization:
                          theirs: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
                        data: {class_path: lkd.CIFAR10DataModule, init_args: {root: data}}
  --data CLASS        the data module; by default the first run's. --data.init_args.KEY VALUE
  --teacher NAME      whose answers the others' are compared with; by default the one named teacher, or the teacher that
                      the first run had
  --split test        test, or val: the validation images
  --batch_sizes [1,64]  batches that are timed, each for --seconds 1.0
  --accelerator auto  where: cpu, gpu, ...
  --members           also show the networks of each method in the terminal, one by one; the page always has them
  --output FOLDER     by default runs/compare; each comparison gets a folder of its own in it
""",
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
  --sampler NAME       tpe (the default; Bayesian: after ten random trials, what did well is tried more), random,
                       grid
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
