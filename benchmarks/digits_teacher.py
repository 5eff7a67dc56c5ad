"""Create the pretrained teacher included in lkd: train configs/digits/teacher.yaml and save the weights in float16.

    python benchmarks/digits_teacher.py

The file's metadata records the config, the seed, the accuracies and the versions.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import save_file

import lkd
from lkd.cli.config_files import configs_folder
from lkd.cli.lightning_cli import LkdCLI
from lkd.models import load_weights, resnet8

FILE = Path(lkd.__file__).parent / "models" / "pretrained" / "digits_resnet8.safetensors"
SEED = 0


def main() -> None:
    """Train, save and reload the teacher, and record its accuracies."""
    config = configs_folder() / "digits" / "teacher.yaml"
    with tempfile.TemporaryDirectory() as folder:
        args = [
            "fit",
            "--config",
            str(config),
            f"--seed_everything={SEED}",
            f"--trainer.default_root_dir={folder}",
        ]
        cli = LkdCLI(args, "teacher")
        best = load_weights(resnet8(num_classes=10, in_channels=1), cli.trainer.checkpoint_callback.best_model_path)
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in best.state_dict().items()
    }
    save_file(weights, FILE)
    module = lkd.ClassificationModule(load_weights(resnet8(num_classes=10, in_channels=1), FILE))
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    (validated,) = trainer.validate(module, cli.datamodule, verbose=False)
    (tested,) = trainer.test(module, cli.datamodule, verbose=False)
    record = {
        "config": config.read_text(),
        "seed": SEED,
        "val_acc": round(validated["val/acc"], 4),
        "test_acc": round(tested["test/acc"], 4),
        "versions": {"lkd": lkd.__version__, "torch": torch.__version__, "lightning": L.__version__},
    }
    save_file(
        weights,
        FILE,
        metadata={name: value if isinstance(value, str) else json.dumps(value) for name, value in record.items()},
    )
    print(
        f"{FILE.name}: {FILE.stat().st_size} bytes, validation {record['val_acc']:.2%}, test {record['test_acc']:.2%}"
    )


if __name__ == "__main__":
    main()
