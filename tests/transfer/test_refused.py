"""Data and settings that would train another thing than was meant are refused before anything is trained."""

import json
import shutil

import numpy as np
import pytest
import timm
from PIL import Image
from scenes import dense_data, model_for, trainer_for
from transformers import AutoBackbone, ConvNextConfig, ResNetConfig

from scalekd_hf.cli import transfer
from scalekd_hf.transfer.building import checked_head_args
from scalekd_hf.transfer.detector import build_detector
from scalekd_hf.transfer.layers import blocks_of
from scalekd_hf.transfer.targets import read_mask


@pytest.fixture
def copied(tmp_path, scenes):
    return shutil.copytree(scenes, tmp_path / "scenes")


def edit(folder, change, split="training"):
    """Change what a COCO file holds."""
    file = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_masks_whose_object_is_255_are_refused(copied):
    for file in (copied / "annotations" / "training").glob("*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(file)) > 0, 255, 0).astype(np.uint8)).save(file)
    with pytest.raises(ValueError, match="values 0 and 255 alone, and 255 means that a pixel does not count"):
        dense_data(copied, "segment")


def test_two_images_of_one_name_are_refused(copied):
    first = copied / "images" / "training" / "0.png"
    Image.open(first).convert("RGB").save(first.with_suffix(".jpg"))
    with pytest.raises(ValueError, match="1 images of the same name as another"):
        dense_data(copied, "segment")


def test_images_of_one_id_are_refused(copied):
    edit(copied, lambda content: [image.update(id=image["id"] % 7) for image in content["images"]])
    with pytest.raises(ValueError, match="has 2 images of the id 0, as files that were merged"):
        dense_data(copied, "detect")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image.pop("file_name"), "cannot be read as a COCO file"),
        (lambda image: image.update(file_name=None), "`file_name` of an image is None"),
        (lambda image: image.update(height="tall"), "cannot be read as a COCO file"),
    ],
)
def test_images_without_a_name_or_a_size_are_refused(copied, change, message):
    edit(copied, lambda content: change(content["images"][0]))
    with pytest.raises(ValueError, match=message):
        dense_data(copied, "detect")


def test_numbers_that_are_written_as_text_mean_the_same(copied, scenes):
    def as_text(content):
        for annotation in content["annotations"]:
            annotation |= {name: str(annotation[name]) for name in ("category_id", "iscrowd", "image_id")}
        for image in content["images"]:
            image |= {name: str(image[name]) for name in ("height", "width")}

    edit(copied, as_text)
    one, other = (dense_data(folder, "detect").train["objects"] for folder in (copied, scenes))
    assert list(one) == list(other)


def test_evaluation_data_without_an_object_are_refused(copied):
    edit(copied, lambda content: content.update(annotations=[]), "validation")
    with pytest.raises(ValueError, match="Not one of the 5 evaluation images has an object"):
        dense_data(copied, "detect")


def test_a_mask_is_turned_as_its_image_is(tmp_path):
    mask = np.arange(16, dtype=np.uint8).reshape(4, 4) % 3
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    Image.fromarray(mask).save(tmp_path / "mask.png", exif=exif)
    assert np.array_equal(read_mask(str(tmp_path / "mask.png"), (4, 4), 3, False), np.rot90(mask, -1))


@pytest.mark.parametrize(
    ("head", "given", "message"),
    [
        ("upernet", {"foo": 1}, "`foo` of `head_args` is not a setting"),
        ("upernet", {"hidden_size": "x"}, "`hidden_size` of `head_args` must be a whole number"),
        ("mask_rcnn", {"rpn_pre_nms_topn_test": 1}, "Did you mean `rpn_pre_nms_top_n_test`"),
        ("mask_rcnn", {"image_size": 32}, "`image_size` of `head_args` is not a setting"),
        ("d_fine", {"num_querys": 3}, "Did you mean `num_queries`"),
        ("d_fine", {"backbone_config": {}}, "`backbone_config` of `head_args` is not a setting"),
    ],
)
def test_arguments_that_a_head_does_not_know_are_refused(head, given, message):
    with pytest.raises(ValueError, match=message):
        checked_head_args(head, given)


def test_more_queries_than_places_are_refused(scenes):
    with pytest.raises(ValueError, match="`num_queries` is 300, but images of 64x64 px have 84 places"):
        build_detector(scenes / "student", ["a"], head="d_fine", image_size=64)


def test_a_batch_of_one_is_refused_by_a_head_that_cannot_learn_from_it(tmp_path, scenes):
    with pytest.raises(ValueError, match="`per_device_train_batch_size` is 1, but the head's BatchNorm needs 2"):
        trainer_for(scenes, tmp_path, per_device_train_batch_size=1)
    trainer_for(scenes, tmp_path, "detect", per_device_train_batch_size=1)


def test_a_run_of_the_other_task_is_not_taken_for_this_one(tmp_path, scenes):
    words = ["--dataset", str(scenes), "--train_split", "training", "--eval_split", "validation", "--image_size", "64"]
    words += [
        "--student",
        str(scenes / "student"),
        "--output_dir",
        str(tmp_path / "run"),
        "--max_steps",
        "1",
        "--use_cpu",
    ]
    words += [
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
        "--save_strategy",
        "no",
        "--per_device_train_batch_size",
        "2",
    ]
    words += ["--class_names", str(scenes / "classes.txt")]
    transfer.main(["segment", *words, "--head_args", '{"hidden_size": 8}'])
    with pytest.raises(ValueError, match="holds a run already"):
        transfer.main(["detect", *words, "--head_args", '{"hidden_size": 8}'])


def test_blocks_are_those_of_the_architecture():
    expected = {"resnet50": 16, "convnext_tiny": 18, "swin_tiny_patch4_window7_224": 12, "vit_base_patch16_224": 12}
    for name, count in expected.items():
        assert len(blocks_of(timm.create_model(name, features_only=True))) == count, name
    small = {"hidden_sizes": [8, 12, 16, 24], "depths": [3, 4, 6, 3]}
    assert len(blocks_of(AutoBackbone.from_config(ResNetConfig(embedding_size=8, **small)))) == 16
    assert len(blocks_of(AutoBackbone.from_config(ConvNextConfig(**small)))) == 16


def test_two_learning_rates_are_in_the_log_as_the_heads(tmp_path, scenes):
    names = ["background", "red", "blue"]
    trainer = trainer_for(
        scenes, tmp_path, model=model_for(scenes, "segment", names), max_steps=1, logging_steps=1, layer_decay=0.5
    )
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 1e-3
