"""Workers that are started anew (`spawn`, as on macOS and Windows) or from a clean process (`forkserver`): what they are sent."""

import pickle
import subprocess
import sys

import datasets
import pytest
import torch
from helpers import DIGITS, settings, small_student, timm_swin

from scalekd_hf import ScaleKDTrainer


EVERYTHING = {"rand_augment": 9.0, "random_erasing": 0.25, "repeated_augmentation": 2, "mixup_alpha": 0.2}


def trainer_on(data, folder, digits, **changes):
    torch.manual_seed(0)
    files = str(DIGITS / "test-00000-of-00002.parquet")
    evaluated = {"stream": datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)}
    return ScaleKDTrainer(
        small_student(),
        timm_swin(),
        settings(folder, **changes),
        data,
        evaluated | {"table": digits.select(range(20))},
    )


@pytest.mark.parametrize("kind", ["digits", "digits_stream"])
@pytest.mark.parametrize("changes", [EVERYTHING, {"antialias": False, "interpolation": "bilinear"}])
def test_what_workers_are_sent_arrives(tmp_path, request, digits, kind, changes):
    trainer = trainer_on(request.getfixturevalue(kind), tmp_path, digits, **changes)
    loaders = [trainer.get_train_dataloader(), *map(trainer.get_eval_dataloader, trainer.eval_dataset)]
    for loader in (getattr(loader, "base_dataloader", loader) for loader in loaders):
        sent = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
        one, other = (
            collate([sample for sample, _ in zip(data, range(4), strict=False)])
            for data, collate in ((loader.dataset, loader.collate_fn), sent[:2])
        )
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and torch.equal(one["labels"], other["labels"])


@pytest.mark.slow
def test_a_run_with_spawned_workers_is_the_one_without(tmp_path, digits, digits_stream):
    logs = []
    for workers in ({}, {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"}):
        trainer = trainer_on(digits_stream, tmp_path / str(len(logs)), digits, max_steps=2, **EVERYTHING, **workers)
        trainer.train()
        found = trainer.evaluate()
        assert all(name in found for name in ("eval_stream_top1", "eval_table_top1"))
        logs.append([trainer.state.log_history[0]["loss"], found["eval_stream_loss"], found["eval_table_loss"]])
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


def test_a_process_that_dies_with_workers_ends(tmp_path):
    (tmp_path / "dies.py").write_text(
        "from torch.utils.data import DataLoader\n"
        "from scalekd_hf.data.stream import outlive_signals\n"
        "options = {'num_workers': 1, 'persistent_workers': True, 'worker_init_fn': outlive_signals}\n"
        "images = iter(DataLoader(list(range(8)), **options))\n"
        "next(images)\n"
        "kept = [images]\n"
        "kept.append(kept)  # only the end of the process lets go of it\n"
        "raise SystemExit(3)\n"
    )
    assert (
        subprocess.run([sys.executable, tmp_path / "dies.py"], timeout=120, stdout=subprocess.DEVNULL).returncode == 3
    )
