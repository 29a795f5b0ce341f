"""Models, data, labels and folders that do not fit each other are refused before any work."""

import datasets
import pytest
import torch
from helpers import settings, small_student, some_slow, timm_swin, timm_vit, transformers_vit
from trainers import trainer_for

from scalekd_hf import ScaleKDConfig, ScaleKDTrainer, load_student, load_teacher
from scalekd_hf.manifest import MANIFEST_FILE


def test_samples_without_labels_are_not_taken_silently(tmp_path):
    data = datasets.Dataset.from_dict({"pixel_values": torch.randn(8, 3, 32, 32).tolist()})
    with pytest.raises(ValueError, match="training samples have no `labels`, only .'pixel_values'.*label_column"):
        trainer_for(tmp_path, data).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.cast_column("label", datasets.Value("string")),
            "`label_column` 'label' has '3' in row 0.*`class_names`",
        ),
        (lambda d: {"a": d.cast_column("label", datasets.ClassLabel(num_classes=3))}, r"`eval_dataset\['a'\]` has 3"),
    ],
)
def test_labels_that_are_no_class_indices_are_refused(tmp_path, digits, change, message):
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, evaluation=change(digits))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: {"teacher": timm_swin(num_classes=7)}, "teacher has 7 classes and the student 10.*logit_weight=0"),
        (
            lambda d: {"teacher": timm_swin(num_classes=0), "logit_weight": 0.5},
            "`logit_weight` is 0.5, but the teacher has no classifier",
        ),
        (
            lambda d: {"teacher": timm_swin(num_classes=0), "label_column": "none"},
            "the classifier of `student`.*would learn nothing.*`num_classes` 0",
        ),
        (
            lambda d: dict.fromkeys(("student", "teacher"), timm_swin()),
            "`student` .* and `teacher` .* share .* parameters, which are frozen in the teacher",
        ),
        (
            lambda d: {"teacher": load_teacher(timm_swin()), "teacher_taps": ["layers.1", "norm"]},
            "`teacher_taps` is .*but the teacher is loaded already, with none",
        ),
        (
            lambda d: {"teacher": load_teacher(timm_vit()), "teacher_last_blocks": 1},
            "`teacher_last_blocks` is 1, but the teacher is loaded already, with 2",
        ),
        (
            lambda d: {"train": d.cast_column("label", datasets.ClassLabel(num_classes=12))},
            "`train_dataset` has 12 classes",
        ),
        (
            lambda d: {"train": d.rename_column("image", "picture")},
            "`train_dataset` has no column 'image'.*picture.*image_column",
        ),
        (lambda d: {"train": d.remove_columns("label")}, "no column 'label'.*`label_column`"),
        (lambda d: {"train": d.select([])}, "`train_dataset` is empty"),
        (lambda d: {"evaluation": datasets.IterableDataset.from_generator(list)}, "`eval_dataset` is empty"),
        (lambda d: {"penultimate_num_heads": 7}, "7 heads for 24 channels"),
        (lambda d: {"student": torch.nn.Linear(2, 2)}, "`student` must be an image classifier"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, digits, make, message):
    options = make(digits)
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, **{"train": digits, **options})


def test_a_teacher_without_a_head_teaches_through_its_features_and_the_log_says_so(tmp_path, digits, caplog):
    trainer = trainer_for(tmp_path, digits, teacher=timm_swin(num_classes=0), max_steps=1, logging_steps=1)
    assert "`logit_weight` is 0, for the teacher has no classifier" in caplog.text
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert "task" in logged and "last_spatial" in logged and "logit" not in logged
    assert trainer.args.logit_weight == 0
    with_head = trainer_for(tmp_path / "other", digits)
    assert with_head.args.logit_weight == 0.5 and with_head.distiller.weights["logit"] == 0.5


def test_a_module_without_label_names_gets_those_of_the_data(tmp_path, digits):
    trainer = ScaleKDTrainer(transformers_vit(), None, settings(tmp_path), digits)
    assert trainer.student.model.config.id2label == dict(enumerate("0123456789"))


def test_an_output_folder_that_holds_a_run_is_not_overwritten_silently(tmp_path, digits):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    first = trainer_for(tmp_path, digits, **options)
    first.train()
    first.save_model()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"holds a run already \(checkpoint-1, checkpoint-2, model.safetensors\).*resume"
    ):
        trainer_for(tmp_path, digits, **options).train()
    trainer_for(tmp_path, digits, **{**options, "max_steps": 1}, overwrite_output_dir=True).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "notes.txt").exists()


def test_there_must_be_a_checkpoint_to_resume_from(tmp_path, digits):
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        trainer_for(tmp_path, digits).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("damage", some_slow(["cut", "gone"], 1))
def test_a_damaged_checkpoint_of_before_is_refused_with_the_file_and_the_others(tmp_path, digits, damage):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_for(tmp_path, digits, **options).train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / MANIFEST_FILE).unlink()  # those that have one are `test_trust.py`'s
    for file in sorted(checkpoint.iterdir()):
        if file.name in ("config.json", "training_args.bin"):
            continue  # is not read
        content = file.read_bytes()
        file.unlink()
        if damage == "cut":
            file.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"checkpoint-2.*{file.name} is missing or damaged.*checkpoint-1"):
            trainer_for(tmp_path, digits, **options).train(resume_from_checkpoint=True)
        file.write_bytes(content)


def test_only_a_scalekd_config_is_taken(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="`args` must be a `ScaleKDConfig`, got a `TrainingArguments`"):
        ScaleKDTrainer(small_student(), None, TrainingArguments(output_dir=str(tmp_path)))
    assert isinstance(ScaleKDConfig(output_dir=str(tmp_path)), TrainingArguments)


@pytest.mark.parametrize("setting", ["dataloader_drop_last", "train_sampling_strategy", "accelerator_config"])
def test_settings_that_streams_do_not_heed_are_named(tmp_path, digits, digits_stream, caplog, setting):
    value = {"train_sampling_strategy": "sequential", "accelerator_config": {"split_batches": True}}.get(setting, True)
    trainer_for(tmp_path, digits_stream, **{setting: value})
    assert f"`{setting}" in caplog.text and "no effect on streams of images" in caplog.text
    caplog.clear()
    trainer_for(tmp_path, evaluation=digits, **{setting: value})
    assert "no effect" not in caplog.text


def test_a_batch_of_one_is_named_where_a_batchnorm_needs_two_values(tmp_path, digits):
    options = {"layers": (1, 1, 1, 1), "channels": (8, 8, 12, 16), "num_classes": 10, "image_size": 32}
    student = load_student("timm/resnet18", **options)
    with pytest.raises(
        ValueError, match="`per_device_train_batch_size` is 1, but a BatchNorm gets a map of a single cell"
    ):
        trainer_for(tmp_path, digits, teacher=None, student=student, per_device_train_batch_size=1).train()
