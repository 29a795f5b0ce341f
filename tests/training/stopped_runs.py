"""Runs that are stopped at a point of a step, and what they have come to."""

import hashlib
import json
import os
import signal
import sys
import time

import datasets
import torch
from helpers import settings, small_student, timm_swin

from scalekd_hf import ScaleKDTrainer
from scalekd_hf.training.run_folder import RunFolder


ALL_AT_ONCE = {
    "max_steps": 9,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "shuffle_buffer_size": 5,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "ema_decay": 0.9,
    "rand_augment": 9,
    "random_erasing": 0.25,
    "hflip": 0.5,
    "teacher_drop_path": 0.3,
    "logging_steps": 3,
}


class Trainer(ScaleKDTrainer):
    """Can be told to die, or to be told to end, at a point of a step."""

    at = ("", 0)
    how = signal.SIGKILL
    rank = 0
    group = False

    def strike(self, point):
        if self.at == (point, self.state.global_step) and self.args.process_index == self.rank:
            sys.stdout.write("struck\n")
            os.kill(0 if self.group else os.getpid(), self.how)
            time.sleep(0.5 * self.group)  # for the workers, too, to hear of it

    def training_step(self, *args, **kwargs):
        result = super().training_step(*args, **kwargs)
        self.strike("step")
        return result

    def prediction_step(self, *args, **kwargs):
        result = super().prediction_step(*args, **kwargs)
        self.strike("evaluation")
        return result

    def _save_rng_state(self, output_dir):
        self.strike("saving")
        return super()._save_rng_state(output_dir)

    def put_in_place(self, *folders):
        self.strike("moving")
        RunFolder.put_in_place(self.run_folder, *folders)


def trainer_for(folder, shards, kind="stream", at=("", 0), how=signal.SIGKILL, rank=0, group=False, **changes):
    torch.manual_seed(0)
    data = datasets.load_dataset("parquet", data_files=shards, split="train", streaming=kind == "stream")
    student, options = small_student(drop_path_rate=0.2), {**ALL_AT_ONCE, **changes}
    evaluation = data if "eval_strategy" in options else None
    trainer = Trainer(student, timm_swin(), settings(folder, **options), data, evaluation)
    trainer.at, trainer.how, trainer.rank, trainer.group = at, how, rank, group
    trainer.run_folder.put_in_place = trainer.put_in_place
    return trainer


def digest(trainer):
    """What a run has come to: weights, average, heads and optimiser, to the bit."""
    found = hashlib.sha256()
    parts = {**trainer.model.student.state_dict(), **trainer.model.heads.state_dict()}
    parts |= {f"average.{name}": value for name, value in trainer.averaged.average.module.state_dict().items()}
    for name, tensor in sorted(parts.items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    for state in trainer.optimizer.state_dict()["state"].values():
        found.update(state["exp_avg_sq"].contiguous().numpy().tobytes())
    return found.hexdigest()


def train(folder, shards, resume=None, **options):
    """A run; its result is in result.json of the folder."""
    trainer = trainer_for(folder, shards, **options)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        result = {"digest": digest(trainer), "step": trainer.state.global_step}
        result |= {"world_size": trainer.args.world_size, "kind": str(trainer.accelerator.distributed_type)}
        result |= {"images_seen": trainer.loss_log.images_seen, "epoch": trainer.state.epoch}
        (trainer_folder := trainer.args.output_dir) and open(f"{trainer_folder}/result.json", "w").write(
            json.dumps(result)
        )


def result(folder):
    return json.loads((folder / "result.json").read_text())


EVALUATING = {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}
