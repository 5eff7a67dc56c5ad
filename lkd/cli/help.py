"""Help texts of the commands: plain text that does not require torch."""

from __future__ import annotations

from lkd.__about__ import __version__
from lkd.cli.catalogue import choices, indented, listed

OWN = {"layers": "lkd.cli.layers", "compare": "lkd.compare", "sweep": "lkd.sweep", "export": "lkd.export"}
"""Commands that lkd adds to Lightning's, with the module whose `main` receives the
arguments after the command."""
SETTINGS = ("fit", "validate", "test", "predict")
"""Commands that accept the settings of a run."""
COMMANDS = (*SETTINGS, *OWN)

HELP = f"""\
lkd {__version__}: knowledge distillation for PyTorch Lightning

usage: lkd COMMAND --config FILE [--config OVERLAY ...] [--KEY VALUE ...]

Commands
  fit        train a network, with or without a teacher
  validate   evaluate a checkpoint on the validation images
  test       evaluate a checkpoint on the test images
  predict    save the predictions of a checkpoint for test images or new images
  layers     list the layers of a network that a criterion can read
  compare    compare checkpoints and networks on the same images
  sweep      search temperature, weights or any other setting
  export     export the network of a checkpoint for use without lkd

Getting started
  lkd fit --config configs/digits/kd.yaml
      distill a teacher into a student, in less than a minute
  lkd test --ckpt_path runs/.../checkpoints/best.ckpt
      evaluate the student; uses the config.yaml of the run

Options
  --config FILE        a settings file; later files and --KEY VALUE override
                       earlier ones; lkd's own are in configs/
  --resume             fit: resume the newest run of this name from its last
                       checkpoint, or start a new one
  --name NAME          name of the run, which is saved in runs/NAME/version_N
  --seeds N            fit: train N runs with seeds 0 to N-1 (or --seeds 0,1,2)
                       and report the mean and standard deviation of their
                       results; with --resume, keep completed runs and resume
                       the others
  --ckpt_path FILE     checkpoint to resume (fit) or to evaluate; last or best:
                       that of the newest run
  --teacher_cache.versions N   use N augmented variants of each image and cache
                               the teacher's outputs for them
  --images FOLDER      predict: use all images in a folder instead of the test
                       images
  --output FOLDER      predict: parent of the new folder; default: runs/predict
  --KEY VALUE          any setting, such as --model.init_args.distill_weight 0.5
                       or --trainer.max_epochs 10
  --print_config       print all settings and exit
  --debug              show the full traceback of an error (also: LKD_DEBUG=1)
  --help, --version    'lkd COMMAND --help' describes a command, 'lkd fit
                       --model.help CLASS' a class
"""

_FIT = """\
usage: lkd fit --config FILE [--config OVERLAY ...] [--KEY VALUE ...]

Train a network, with or without a teacher. --resume continues the newest run of
the same name.

Modules (--model CLASS)
{modules}

Data (--data CLASS)
{data}

Criteria (--model.init_args.criterion CLASS)
{criteria}

Common settings
  --model.init_args.teacher_ckpt FILE       weights of the teacher
  --model.init_args.distill_weight 0.9      weight of the criterion
  --model.init_args.hard_weight 0.1         weight of the cross-entropy
  --model.init_args.optimizer.init_args.lr 0.05
  --data.init_args.batch_size 128           also root, num_workers, augment, ...
  --trainer.max_epochs 240                  also devices, precision, ...
  --seed_everything 0                       random seed
  --name NAME                               save the run in runs/NAME/version_N

More help
  lkd fit --model.help                      list the modules
  lkd fit --data.help                       list the data modules
  lkd fit --criterion.help                  list the criteria; also optimizer,
                                            lr_scheduler, callbacks, trainer
  lkd fit --model.help CLASS                describe the settings of a class
  lkd fit --config FILE --print_config      print the settings of a run
  lkd fit --help all                        describe all settings (long)
"""

_MEASURE = """\
usage: lkd {command} --ckpt_path FILE [--config FILE ...] [--KEY VALUE ...]

{what}
Without --config, the config.yaml of the checkpoint's run is used.

{examples}

Options
  --ckpt_path FILE     a checkpoint, or the folder of a run (its best
                       checkpoint); best or last, with --name NAME: of the
                       newest run
  --config FILE        a config, as for lkd fit
{options}  --data.init_args.root FOLDER          location of the images, if they
                                        have moved
  --data.init_args.batch_size 256       also num_workers, ...
  {limit:38}use only some batches
  --trainer.devices 1                   also accelerator, precision, ...
  --model.init_args.model_ckpt FILE     weights from elsewhere, with --config
                                        and without --ckpt_path; for a
                                        DistillModule student_ckpt and
                                        teacher_ckpt

More help
  lkd fit --help                        list modules, data and criteria
  {all:38}describe all settings (long)
"""
_MEASURED = {
    "validate": (
        "Evaluate a checkpoint on the validation images.",
        "  lkd validate --ckpt_path runs/digits/kd/version_0/checkpoints/best.ckpt",
        "",
    ),
    "test": (
        "Evaluate a checkpoint on the test images.",
        "  lkd test --ckpt_path runs/digits/kd/version_0/checkpoints/best.ckpt\n"
        "  lkd test --ckpt_path best --name digits/kd",
        "",
    ),
    "predict": (
        "Save the predictions of a checkpoint for the test images, or for new images, in\n"
        "a new folder. Classification and segmentation: predictions.csv, with one line\n"
        "per image; segmentation: also masks/. Detection: detections.json, in COCO's\n"
        "results format. Other tasks: NumPy files in arrays/.",
        "  lkd predict --ckpt_path runs/digits/kd/version_0/checkpoints/best.ckpt\n"
        "  lkd predict --ckpt_path best --name digits/kd --images FOLDER",
        "  --images FOLDER      use all images in a folder instead of the test images\n"
        "  --output FOLDER      parent of the new folder; default: runs/predict\n",
    ),
}


def settings_help(command: str) -> str:
    """Return the help of `lkd fit`, or of a command that evaluates a checkpoint."""
    if command in _MEASURED:
        what, examples, options = _MEASURED[command]
        limit = f"--trainer.limit_{'val' if command == 'validate' else command}_batches 10"
        texts = {"what": what, "examples": examples, "options": options, "limit": limit}
        return _MEASURE.format(command=command, all=f"lkd {command} --help all", **texts)
    data = [name.removesuffix("DataModule") for name in choices("lkd.datamodules")]
    return _FIT.format(
        modules="\n".join(listed("lkd.modules")),
        data=indented(f"{', '.join(data)} (each with the suffix DataModule)"),
        criteria=indented(", ".join(choices("lkd.losses"))),
    )


OWN_HELP = {
    "layers": """\
usage: lkd layers CLASS_PATH [--KEY VALUE ...] [--input_size SIZE]
       lkd layers --config FILE [--config OVERLAY ...] [--KEY VALUE ...]
                  [--input_size SIZE]

List the layers of a network, or of the student and teacher of a run, with their
output shapes and the groups (@stages, @pooled, ...) that contain them. These
are the names that student_layers and teacher_layers of a criterion accept.

  lkd layers lkd.models.resnet20 --num_classes 10
  lkd layers lkd.models.timm_model --name vit_tiny_patch16_224 \\
    --num_classes 10 --input_size 224
  lkd layers my_net.Net
      my_net.py in the current folder
  lkd layers --config configs/digits/kd.yaml

  --input_size SIZE    size of the input: 224, height and width (64 48), or
                       channels, height and width (3 64 48); default: the size
                       of the data if a config specifies it, otherwise 32
""",
    "compare": """\
usage: lkd compare [NAME=]RUN ... [--config FILE] [--KEY VALUE ...]

Compare checkpoints and networks on the same images: accuracy with 95 %
intervals, negative log-likelihood, calibration, agreement with the teacher,
accuracy per class, parameters, FLOPs, size, and latency and throughput on this
device. Segmentation: mean IoU with 95 % intervals, pixel accuracy, IoU per
class, and agreement with the teacher. Runs that differ only in their seed form
one row: mean, standard deviation, n and 95 % interval over the seeds. Welch's
t-test compares two such groups of runs; McNemar's test compares two trained
classifiers. The tables are printed; an HTML page, Markdown, JSON and
TensorBoard scalars are saved in a new folder.

  lkd compare runs/digits/kd alone=runs/digits/student
      also evaluates the teacher of the first run
  lkd compare distilled=runs/cifar10/kd --config others.yaml
  lkd compare runs/digits/kd/version_* runs/digits/student/version_*
      several seeds, as from lkd fit --seeds 5

  RUN                 a checkpoint; the folder of a run, or of all runs with the
                      same name (best checkpoint of the newest run)
  --config FILE       networks from elsewhere, the data, and any of the settings
                      below:
                        networks:
                          theirs:
                            class_path: lkd.models.load_weights
                            init_args:
                              path: theirs.pth
                              network:
                                class_path: lkd.models.resnet20
                                init_args: {num_classes: 10}
                        normalization:
                          theirs:
                            mean: [0.485, 0.456, 0.406]
                            std: [0.229, 0.224, 0.225]
                        data:
                          class_path: lkd.CIFAR10DataModule
                          init_args: {root: data}
  --data CLASS        data module, with --data.init_args.KEY VALUE; default:
                      that of the first run
  --teacher NAME      network whose predictions serve as the reference for
                      agreement and KL; default: the network named teacher, or
                      the teacher of the first run that has one
  --split test        test, or val for the validation images
  --batch_sizes [1,64]  batch sizes to time, each for --seconds 1.0
  --accelerator auto  device: cpu, gpu, ...
  --members           also print the individual networks of each group; the
                      HTML page always includes them
  --output FOLDER     parent of the new folder; default: runs/compare
""",
    "sweep": """\
usage: lkd sweep --config FILE [--config OVERLAY ...] --space FILE [--trials N]
                 [--KEY VALUE ...]

Search settings of lkd fit. Each trial is a run of lkd fit in this process, with
settings from the search space. Its value is that of its best checkpoint: the
largest main metric of the task (classification: val/acc), unless --monitor
selects another metric. Repeating the command resumes an interrupted search;
several simultaneous processes on one machine share the work.

  lkd sweep --config digits/kd --space sweep/temperature_weight --trials 20
  lkd sweep --config digits/kd --space sweep/temperature_weight_grid \\
    --sampler grid --teacher_cache.versions 1
  lkd sweep --config digits/kd \\
    --space.model.init_args.optimizer.init_args.lr '{low: 0.01, high: 1}'

  --space FILE         settings by their names in a config, each with a list of
                       choices or a range; can be repeated
                         model.init_args.distill_weight: [0.1, 0.5, 0.9]
                         trainer.max_epochs: {low: 5, high: 20, step: 5}
                         data.init_args.batch_size: [32, 64, 128]
  --space.KEY VALUE    the same for one setting; overrides the files
  --trials N           total number of trials; default: 20, or all cells of a
                       grid
  --sampler NAME       tpe (default; Bayesian: ten random trials, then settings
                       similar to the best ones), random, grid
  --sampler_seed N     seed of the sampler; default: 0. Every trial is trained
                       with the seed_everything of the config
  --pruner NAME        none (default), median, halving, hyperband: stop
                       unpromising trials early
  --monitor NAME       metric that selects the best checkpoint and whose value
                       is the value of the trial; losses are minimized
  --study NAME         folder of the study, next to version_0, ...; default:
                       sweep. Each search requires its own name
  --storage PLACE      storage of the study: an Optuna URL (postgresql://...),
                       to share the work between machines; a file, in SQLite
                       format if it ends in .db, otherwise a journal; default:
                       study.db in its folder
  --take_over N ...    resume trials of another machine; make sure that no
                       process is still running them
  --give_up N ...      mark interrupted trials as failed, for example if they
                       run out of memory and their process is killed
  --KEY VALUE          any setting of lkd fit

The folder of the study contains best.yaml (config of the best trial, for lkd
fit), trials.csv, study.html, and trial_0000, ... with checkpoints, TensorBoard
logs and log.txt. Each trial uses one device. To use several devices, start the
command once per device:

  CUDA_VISIBLE_DEVICES=0 lkd sweep ... &
  CUDA_VISIBLE_DEVICES=1 lkd sweep ... & wait
""",
    "export": """\
usage: lkd export CHECKPOINT [--format FORMATS] [--output FOLDER] [--int8]
                  [--license ID] [--KEY VALUE ...]

Export a trained network for use without lkd. CHECKPOINT is a file, the folder
of a run, or the folder of all runs with the same name (best checkpoint of the
newest run). Each file is loaded again and evaluated on the test images: if any
logit differs from that of the checkpoint by more than 1e-4, lkd reports an error
and exports nothing. The folder also contains preprocessing.json, whose content
is embedded in each file, and a model card, README.md, with code to use the
files.

  lkd export runs/digits/kd
  lkd export runs/digits/kd --format onnx --int8 --output digits_onnx

  --format FORMATS     comma-separated: safetensors (weights), torch (a program
                       for torch.export.load), onnx; default: all three. onnx
                       requires pip install 'lightning-kd[onnx]'
  --output FOLDER      output folder; default: export in the folder of the run
  --overwrite          replace an existing export
  --int8               also export an 8-bit ONNX file, calibrated on training
                       images; its differences are reported, but not
                       limited to 1e-4
  --license ID         license stated in the model card, as a Hugging Face
                       identifier; default: unknown
  --images N           compare on at most N evenly spaced test images; default:
                       10000
  --KEY VALUE          override a setting of the run, such as
                       --data.init_args.root FOLDER if the images have moved

From Python: lkd.export.export("runs/digits/kd", formats=["onnx"])
""",
}
"""Complete help texts of `lkd COMMAND --help`, by command."""
