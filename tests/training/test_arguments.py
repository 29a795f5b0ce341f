"""Every argument of `Trainer` and `TrainingArguments` is used as ever, or refused with the reason.

docs/arguments.md says so: SCALEKD_WRITE_DOCS=1 pytest tests/training/test_arguments.py writes its tables.
"""

import dataclasses
import inspect
import os

import pytest
from helpers import ROOT, settings, small_student
from transformers import Trainer, TrainingArguments

from scalekd_hf import ScaleKDTrainer
from scalekd_hf.training.refused import REFUSED_ARGUMENTS, REFUSED_SETTINGS


# Looked at one by one: used by the parent or by us as `transformers` describes them. A new one must be, too.
USED = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
gradient_accumulation_steps max_grad_norm label_smoothing_factor bf16 fp16 bf16_full_eval fp16_full_eval tf32
activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
torch_compile_backend torch_compile_mode torch_empty_cache_steps logging_strategy logging_steps logging_first_step
log_on_each_node log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start
eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model
save_strategy save_steps save_on_each_node save_total_limit push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config dataloader_num_workers
dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config
deepspeed debug skip_memory_metrics resume_from_checkpoint local_rank
""".split()
WITHOUT_EFFECT = {
    "ignore_data_skip": "a stream of images finds its place itself; other data sets heed it",
    "dataloader_drop_last": "training is one endless sequence of images, which the log says; an evaluation drops nothing",
    "dataloader_in_order": "images come in order, which the log says; other data sets heed it",
    "length_column_name": "images have no lengths",
    "average_tokens_across_devices": "a loss is a mean over images, and not over tokens",
    "do_train": "as in `Trainer`, it is for scripts; the recipes always train",
    "do_eval": "as in `Trainer`, it is for scripts; `eval_strategy` and `eval_split` say what is evaluated",
    "do_predict": "as in `Trainer`, it is for scripts",
}
TAKEN = """
model args data_collator train_dataset eval_dataset compute_metrics callbacks optimizers optimizer_cls_and_kwargs
preprocess_logits_for_metrics
""".split()


def test_every_setting_of_the_parent_has_been_looked_at():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    known = {*USED, *WITHOUT_EFFECT, *REFUSED_SETTINGS}
    assert not names - known, f"new in transformers: used, or refused with a reason? {sorted(names - known)}"
    assert len(USED) + len(WITHOUT_EFFECT) + len(REFUSED_SETTINGS) == len(known)


def test_every_argument_of_the_parent_has_been_looked_at():
    names = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert not names - {*TAKEN, *REFUSED_ARGUMENTS}, "new in transformers"


OTHERS = {
    "label_names": ["label"],
    "parallelism_config": object(),
    "train_sampling_strategy": "group_by_length",
    "include_num_input_tokens_seen": "all",
    "neftune_noise_alpha": 5.0,
    "liger_kernel_config": {"rope": True},
}


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_a_setting_without_use_is_refused_with_the_reason(tmp_path, name):
    if name not in {field.name for field in dataclasses.fields(TrainingArguments)}:
        pytest.skip(f"this transformers has no {name}")
    with pytest.raises(ValueError, match=f"`{name}` must be .*: .*{REFUSED_SETTINGS[name][1][:20]}"):
        config = settings(tmp_path)
        setattr(config, name, OTHERS.get(name, True))
        from scalekd_hf.training.refused import check_refused_settings

        check_refused_settings(config)


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_an_argument_without_use_is_refused_with_the_reason(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` is not taken: {REFUSED_ARGUMENTS[name][:15]}"):
        ScaleKDTrainer(small_student(), None, settings(tmp_path), **{name: lambda *args: None})


def test_metrics_by_batches_need_a_metric_that_adds_them_up(tmp_path):
    with pytest.raises(ValueError, match="`batch_eval_metrics` needs a `compute_metrics`"):
        ScaleKDTrainer(small_student(), None, settings(tmp_path, batch_eval_metrics=True))


def test_the_seed_of_the_data_decides_their_order_and_augmentation(tmp_path, digits):
    batches = []
    for seeds in ({"seed": 1}, {"seed": 2, "data_seed": 1}, {"seed": 2}):
        trainer = ScaleKDTrainer(small_student(), None, settings(tmp_path, **seeds), digits)
        batches.append(next(iter(trainer.get_train_dataloader()))["pixel_values"])
    assert (batches[0] == batches[1]).all() and not (batches[0] == batches[2]).all()


def test_the_page_is_that_of_the_code():
    page = ROOT / "docs" / "arguments.md"
    head, _, _ = page.read_text().partition("\n## ")
    sections = {
        "Arguments of `Trainer`": {
            **{f"`{name}`": "as in `Trainer`, see `ScaleKDTrainer`" for name in TAKEN},
            **{f"`{name}`": f"refused: {reason}" for name, reason in REFUSED_ARGUMENTS.items()},
        },
        "Settings of `TrainingArguments`": {
            **{
                f"`{name}`": f"refused, but {allowed[0]!r}: {reason}"
                for name, (allowed, reason) in REFUSED_SETTINGS.items()
            },
            **{f"`{name}`": f"without effect: {reason}" for name, reason in WITHOUT_EFFECT.items()},
            "all others": "as in `TrainingArguments`: " + ", ".join(f"`{name}`" for name in USED),
        },
    }
    text = head
    for title, rows in sections.items():
        lines = [f"| {name} | {what} |" for name, what in rows.items()]
        text += "\n".join([f"\n## {title}", "", "| | |", "|---|---|", *lines, ""])
    if os.environ.get("SCALEKD_WRITE_DOCS"):
        page.write_text(text)
    assert page.read_text() == text
