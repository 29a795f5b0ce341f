"""Two steps of distillation in one or more processes; rank 0 writes what happened."""

import json
from pathlib import Path

import datasets
import torch
from helpers import DIGITS, settings, small_student, timm_swin

from scalekd_hf import ScaleKDTrainer, load_student


def averaged_buffers(folder: str, data: datasets.Dataset) -> bool:
    """Whether BatchNorm's averaged statistics are the same in all processes once they are evaluated."""
    student = load_student("timm/resnet18", labels=list("0123456789"), channels=(8, 8, 8, 8))
    options = {"ema_decay": 0.5, "max_steps": 2, "per_device_train_batch_size": 2, "image_size": 64}
    trainer = ScaleKDTrainer(student, None, settings(f"{folder}/averaged", **options), data, data)
    trainer.train()
    trainer.evaluate()
    buffers = trainer.averaged.average.module.buffers()
    flat = torch.cat([buffer.flatten() for buffer in buffers if buffer.is_floating_point()])
    return all(torch.equal(other, flat) for other in trainer.accelerator.gather(flat[None]))


def main(folder: str, batch: str) -> None:
    data = datasets.Dataset.from_parquet(str(DIGITS / "train-00000-of-00004.parquet")).select(range(96))
    torch.manual_seed(0)
    options = {"optim": "sgd", "learning_rate": 0.03, "max_steps": 2, "per_device_train_batch_size": int(batch)}
    twice = data.select(range(8))  # the second step is a second pass
    trainer = ScaleKDTrainer(small_student(), timm_swin(), settings(folder, **options), twice)
    trainer.train()
    averaged = averaged_buffers(folder, twice)
    flat = torch.cat([parameter.detach().flatten() for parameter in trainer.student.parameters()])
    everyone = trainer.accelerator.gather(flat[None])
    stream = datasets.load_dataset(
        "parquet", data_files=[str(DIGITS / "test-00000-of-00002.parquet")], split="train", streaming=True
    )
    evaluated = {"map": trainer.predict(data).label_ids, "stream": trainer.predict(stream).label_ids}
    if trainer.is_world_process_zero():
        result = {
            "world_size": trainer.accelerator.num_processes,
            "distributed_type": str(trainer.accelerator.distributed_type).rsplit(".", 1)[-1],
            "history": [entry for entry in trainer.state.log_history if "loss" in entry],
            "weights": flat.tolist(),
            "evaluated": {name: labels.tolist() for name, labels in evaluated.items()},
            "averaged_buffers_equal": averaged,
            "equal_on_all_ranks": all(torch.equal(other, flat) for other in everyone),
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "log.json").write_text(json.dumps(result))
