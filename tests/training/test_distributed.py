"""Two processes and their ways of sharing the work equal one, and what they save is the student alone."""

import json
import os
import signal
import subprocess
import time

import datasets
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from helpers import DIGITS, RECOMPUTE, ROOT, TEACHER, settings, small_student, some_slow, timm_swin, timm_vit
from launched_runs import LAUNCH, TERMS, WAYS, assert_without_teacher, result, tapped_student, train, use_fsdp2
from processes import Started, as_main, free_port, in_processes
from safetensors.torch import load_file
from transformers import TrainerCallback

from scalekd_hf import NonFiniteLossError, ScaleKDTrainer, load_teacher


@pytest.mark.parametrize("way", some_slow(WAYS, 1))
def test_two_processes_equal_one(tmp_path, alone, way):
    for outcome in in_processes(tmp_path, train, tmp_path, way, processes=2):
        assert outcome.status == 0, outcome.text[-3000:]
    one, two = result(alone), result(tmp_path)
    assert two["world_size"] == 2
    kind = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}.get(way, "DEEPSPEED")
    assert two["kind"] == f"DistributedType.{kind}"
    assert two["partitioned"] == (two["parameters"] if way.startswith(("zero3", "fsdp2")) else 0)
    for first, second in zip(one["history"], two["history"], strict=True):
        for name in TERMS:
            assert second[name] == pytest.approx(first[name], rel=1e-5), name
    mine, theirs = load_file(alone / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-4, atol=1e-6), name
    if way in ("zero2", "zero3"):
        assert_without_teacher(tmp_path / "checkpoint-4", way)


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.yaml")), ids=lambda file: file.stem)
def test_launch_configurations_are_what_accelerate_takes(file):
    config = load_config_from_file(str(file))
    assert config.num_processes == {"single_gpu": 1, "cpu": 1, "multi_node": 32}.get(file.stem, 8)
    engine = getattr(config, "deepspeed_config", None)
    if engine:
        stage = json.loads((ROOT / engine["deepspeed_config_file"]).read_text())["zero_optimization"]["stage"]
        assert file.stem.startswith(f"zero{stage}")


def weights(folder):
    """What a run has come to: the saved student, and the rest of its last checkpoint."""
    files = [folder / "model.safetensors", *sorted((folder / "checkpoint-4").glob("*.safetensors"))]
    return {(file.name, name): tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("way", some_slow(["ddp", "fsdp2", "zero2", "zero3"], 1))
def test_a_run_of_two_processes_resumes_to_the_bit_with_its_average(tmp_path, way):
    options = {"ema_decay": 0.9, "max_steps": 4, "mixup_alpha": 0.8, "streaming": True, "optim": "adamw_torch"}
    results = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        for outcome in in_processes(tmp_path, lambda: train(tmp_path, way, resume=resume, **options), processes=2):  # noqa: B023
            assert outcome.status == 0, outcome.text[-3000:]
        results.append(weights(tmp_path))
    assert results[0].keys() == results[1].keys() and ("trained_student.safetensors", "head.fc.weight") in results[0]
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("way", some_slow(["ddp", "zero2"], 1))
def test_a_checkpoint_of_two_processes_starts_one_and_says_what_stays_behind(tmp_path, way):
    options = {"ema_decay": 0.9, "streaming": True, "optim": "adamw_torch"}
    for outcome in in_processes(tmp_path, lambda: train(tmp_path, way, **options), processes=2):
        assert outcome.status == 0, outcome.text[-3000:]
    before = load_file(tmp_path / "checkpoint-4" / "trained_student.safetensors")

    def alone():
        resume = str(tmp_path / "checkpoint-4")
        with pytest.raises(ValueError, match="processes 2 to 1" if way == "ddp" else "optimizer.pt is missing"):
            train(tmp_path, "ddp", resume=resume, **options)
        logs = train(tmp_path, "ddp", resume=resume, **options, max_steps=6, allow_data_mismatch=True)
        assert [entry["images_seen"] for entry in logs if "loss" in entry and entry["step"] > 4] == [36, 40]
        assert logs[-2]["learning_rate"] < 0.02 / 2  # the schedule went on

    (outcome,) = in_processes(tmp_path, alone)
    assert outcome.status == 0, outcome.text[-3000:]
    after = load_file(tmp_path / "checkpoint-6" / "trained_student.safetensors")
    assert all((after[name] - before[name]).abs().max() < 0.1 for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_everything_together_under_ddp_equals_one_plain_process(tmp_path, bf16):
    plain = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "ema_decay": 0.9}
    # What is compiled costs as its blocks are many.
    plain |= {"student": lambda: tapped_student(depths=(1, 1, 1, 1)), "teacher": lambda: timm_vit(depth=3)}
    all_on = {
        RECOMPUTE: True,
        "torch_compile": True,
        "torch_compile_backend": "aot_eager",
        "bf16": bf16,
    }
    one, two = (tmp_path / name for name in "12")
    for processes, batch, folder, options in ((1, 4, one, {}), (2, 2, two, all_on)):
        run_it = lambda: train(folder, "ddp", batch, max_steps=3, **plain, **options)  # noqa: B023, E731
        for outcome in in_processes(folder, run_it, processes=processes):
            assert outcome.status == 0, outcome.text[-3000:]
    assert result(two)["world_size"] == 2
    for first, second in zip(result(one)["history"], result(two)["history"], strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-2 if bf16 else 1e-5)
        assert bf16 or second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zero2", "zero3", "fsdp2"])
def test_under_an_engine_the_best_is_loaded_and_models_are_evaluated_before_and_after_training(tmp_path, way):
    def run_and_evaluate():
        os.environ["DS_ACCELERATOR"] = "cpu"
        if way == "fsdp2":
            use_fsdp2()
        data = datasets.Dataset.from_parquet(str(DIGITS / "train-00000-of-00004.parquet")).select(range(64))
        options = {
            "max_steps": 3,
            "ema_decay": 0.5,
            "save_strategy": "steps",
            "save_steps": 1,
            "eval_strategy": "steps",
        }
        options |= {"eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", **WAYS[way]}
        torch.manual_seed(0)
        args = settings(tmp_path, optim="sgd", greater_is_better=True, learning_rate=0.1, **options)
        trainer = ScaleKDTrainer(small_student(), timm_swin(), args, data, data)
        untrained = [trainer.evaluate()["eval_loss"] for _ in range(2)]
        assert untrained[0] == untrained[1]
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-3:]
        assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-5) and len(set(losses)) == 3

    for outcome in in_processes(tmp_path, run_and_evaluate, processes=2):
        assert outcome.status == 0, outcome.text[-3000:]


SRUN = """#!/usr/bin/env bash
shift
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & echo $! >> "$TASKS"; done
wait
"""


SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && echo localhost || echo "$*" >> "$REQUEUED"
"""


@pytest.mark.slow
def test_the_slurm_script_starts_its_tasks_and_puts_an_interrupted_run_in_the_queue_again(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):  # what SLURM's do on one machine
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    text = (ROOT / "recipes" / "configs" / "quickstart.yaml").read_text()
    (tmp_path / "run.yaml").write_text(f"{text}\nuse_cpu: true\nbaseline: false\nmax_steps: 100\nlogging_steps: 1\n")
    job = str(free_port() - 20000)  # which is what the script makes its port of
    requeued, log = tmp_path / "requeued", tmp_path / "log"
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "REQUEUED": str(requeued),
        "TASKS": str(tmp_path / "tasks"),
        "SLURM_JOB_ID": job,
    }
    env |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NODELIST": "one"}
    words = ["bash", "recipes/accelerate/slurm.sh", tmp_path / "run.yaml", tmp_path / "run"]
    for interrupt in (True, False):
        with log.open("w") as output:
            started = subprocess.Popen(words, cwd=ROOT, env=env, stdout=output, stderr=output)
        while interrupt and "images/s" not in log.read_text() and started.poll() is None:
            time.sleep(0.2)
        if interrupt:
            assert started.poll() is None, log.read_text()[-3000:]
            for task in (tmp_path / "tasks").read_text().split():
                os.kill(int(task), signal.SIGTERM)
        assert started.wait(timeout=200) == 0, log.read_text()[-3000:]
        assert requeued.read_text() == f"requeue {job}\n", log.read_text()[-3000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["student distilled"]["top1"] > 0


@pytest.mark.slow
def test_an_optimiser_of_deepspeeds_own_trains_and_resumes(tmp_path):
    own = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}}}
    deepspeed = {**WAYS["zero1"]["deepspeed"], **own}
    options = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "deepspeed": deepspeed}
    for resume in (None, str(tmp_path / "checkpoint-4")):
        (outcome,) = in_processes(tmp_path, lambda: train(tmp_path, "ddp", resume=resume, **options), group=True)  # noqa: B023
        assert outcome.status == 0, outcome.text[-3000:]
    assert len(result(tmp_path)["history"]) == 5


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs they train together")
@pytest.mark.parametrize(
    "words",
    [
        ["recipes/distill.py", "--max_steps", "2"],
        ["recipes/evaluate.py", TEACHER, "--eval_files", DIGITS / "test-*.parquet"],
    ],
    ids=["distill", "evaluate"],
)
def test_processes_that_would_each_work_alone_are_refused(tmp_path, words):
    for outcome in in_processes(tmp_path, as_main, *words, "--output_dir", tmp_path / "run", processes=2):
        assert outcome.status == 2 and "2 processes were started, but without a GPU each would" in outcome.text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_recipe_runs_to_its_end_under_zero3(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    words = [
        "recipes/distill.py",
        "recipes/configs/quickstart.yaml",
        "--baseline",
        "false",
        "--max_steps",
        "4",
        "--use_cpu",
    ]
    words += ["--eval_strategy", "no", "--ema_decay", "0.9", "--deepspeed", "recipes/accelerate/zero3.json"]
    for outcome in in_processes(tmp_path, as_main, *words, "--output_dir", tmp_path / "run", processes=2):
        assert outcome.status == 0, outcome.text[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["teacher"]["top1"] >= 0.93 and "top1" in results["student distilled"]
    assert "0.249 M parameters" in (tmp_path / "run" / "README.md").read_text()


def test_two_runs_into_one_folder_are_refused_and_the_first_goes_on(tmp_path):
    first = Started(tmp_path, lambda: train(tmp_path, "ddp", max_steps=40, save_strategy="no"))
    while "images/s" not in first.files[0].read_text():
        time.sleep(0.05)
    locked = (tmp_path / "_lock").stat().st_ino
    for outcome in in_processes(tmp_path, train, tmp_path, "ddp", processes=2):
        assert outcome.status == 1 and "is being written by another run" in outcome.text
    (outcome,) = first.wait()
    assert outcome.status == 0, outcome.text[-3000:]
    assert (tmp_path / "_lock").stat().st_ino == locked  # a file that is unlinked can be locked twice


def test_a_loss_that_is_not_finite_on_one_process_stops_all(tmp_path):
    def diverge():
        rank = int(os.environ["RANK"])
        teacher = load_teacher(timm_swin())
        if rank == 1:
            teacher.model.head.register_forward_hook(lambda _, inputs, output: output * float("nan"))
        data = datasets.Dataset.from_parquet(str(DIGITS / "train-00000-of-00004.parquet"))
        with pytest.raises(NonFiniteLossError, match="step 1: .*logit=nan"):
            ScaleKDTrainer(small_student(), teacher, settings(tmp_path, max_steps=4), data).train()

    for outcome in in_processes(tmp_path, diverge, processes=2):
        assert outcome.status == 0, outcome.text[-3000:]


def test_a_process_that_dies_ends_the_others(tmp_path):
    class Dying(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and args.process_index == 1:
                os._exit(3)

    def run():
        data = datasets.Dataset.from_parquet(str(DIGITS / "train-00000-of-00004.parquet"))
        options = {"max_steps": 1000, "ddp_timeout": 20}
        ScaleKDTrainer(small_student(), timm_swin(), settings(tmp_path, **options), data, callbacks=[Dying()]).train()

    start = time.monotonic()
    outcomes = in_processes(tmp_path, run, processes=2)
    assert [outcome.status for outcome in outcomes] == [1, 3] and time.monotonic() - start < 40
