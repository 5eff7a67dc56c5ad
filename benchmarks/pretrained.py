"""Create a pretrained teacher included in lkd: train its config and save the weights in float16.

    python benchmarks/pretrained.py digits_resnet8

The file's metadata records the config, the seed, the scores and the versions.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import save_file

import lkd
from lkd.cli.config_files import configs_folder
from lkd.cli.lightning_cli import LkdCLI
from lkd.models import load_weights

FOLDER = Path(lkd.__file__).parent / "models" / "pretrained"
CONFIGS = {"digits_resnet8": "digits/teacher.yaml", "shapes_unet": "shapes/teacher.yaml"}
SEED = 0


def main(name: str) -> None:
    """Train, save and reload a teacher, and record its scores.

    Args:
        name: Name of the file, a key of `CONFIGS`.
    """
    config, file = configs_folder() / CONFIGS[name], FOLDER / f"{name}.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        place = f"--trainer.default_root_dir={folder}"
        cli = LkdCLI(["fit", "--config", str(config), f"--seed_everything={SEED}", place], "teacher")
        module = cli.model
        load_weights(module.model, cli.trainer.checkpoint_callback.best_model_path)
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in module.model.state_dict().items()
    }
    save_file(weights, file)
    load_weights(module.model, file)  # the scores are those of the rounded weights
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    (validated,) = trainer.validate(module, cli.datamodule, verbose=False)
    (tested,) = trainer.test(module, cli.datamodule, verbose=False)
    metric = module.task.metric
    record = {
        "config": config.read_text(),
        "seed": SEED,
        f"val_{metric}": round(validated[f"val/{metric}"], 4),
        f"test_{metric}": round(tested[f"test/{metric}"], 4),
        "versions": {"lkd": lkd.__version__, "torch": torch.__version__, "lightning": L.__version__},
    }
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in record.items()}
    save_file(weights, file, metadata=texts)
    size = file.stat().st_size
    print(f"{file.name}: {size} bytes, {metric}: {record[f'val_{metric}']:.2%} (val), {record[f'test_{metric}']:.2%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
