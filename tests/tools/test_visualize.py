"""Maps and pictures of where teacher and student agree."""

import numpy as np
import pytest
import torch
import yaml
from helpers import images, settings, small_student, timm_swin, timm_vit
from PIL import Image
from processes import run_script

from scalekd_hf import ScaleKDModel, ScaleKDTrainer, frequency_mimicking_loss
from scalekd_hf.method.heads import FEATURE_TERMS
from scalekd_hf.tools.visualize import agreement_maps, cosine_map, draw_agreement
from scalekd_hf.training.distillation_checkpoints import HEADS_FILE
from scalekd_hf.training.model import build_model


RECIPE = "recipes/visualize.py"


def small_model(folder, teacher=None, **changes):
    return build_model(small_student(), teacher or timm_swin(), settings(folder, **changes))


def losses_of(model, pixel_values):
    model.eval()
    penultimate, last, _ = model.student(pixel_values)
    teacher_last, _ = model.teacher(model.normaliser.for_teacher(pixel_values))
    return model.heads(penultimate, last, teacher_last, model.teacher.last_stage)


@pytest.mark.parametrize("changes", [{}, {"remove_direct_component": False}, {"stem": "shared"}])
def test_the_feature_losses_are_told_by_the_maps(tmp_path, changes):
    model = small_model(tmp_path, **changes)
    maps = agreement_maps(model, images())
    assert tuple(maps) == FEATURE_TERMS
    for term, loss in losses_of(model, images()).items():
        cosines, (height, width) = maps[term], model.teacher.grid
        assert cosines.shape == (2, height, width) and cosines.abs().max() <= 1 and cosines.std() > 0
        assert loss.item() == pytest.approx(2 * height * width * (1 - cosines.mean().item()), rel=1e-5), term


@pytest.mark.parametrize(
    ("changes", "terms"),
    [
        ({"frequency_weight": 0.0}, ("penultimate_spatial", "last_spatial")),
        ({"frequency_weight": 0.0, "last_frequency_weight": 1.0}, (*FEATURE_TERMS[::2], "last_frequency")),
        ({"learned_last_queries": True}, FEATURE_TERMS),
    ],
)
def test_the_maps_are_those_of_the_terms_in_use(tmp_path, changes, terms):
    model = small_model(tmp_path, teacher=timm_vit(), **changes)
    maps = agreement_maps(model, images())
    assert tuple(maps) == terms
    for term, loss in losses_of(model, images()).items():
        assert loss.item() == pytest.approx((1 - maps[term]).sum().item(), rel=1e-5), term  # 2 images


def test_a_map_lies_as_the_teachers_grid_does():
    teacher_map = torch.randn(1, 8, 2, 3)
    tokens = teacher_map.clone()
    tokens[0, :, 1, 0] *= -5
    cosines = cosine_map(tokens.flatten(2).transpose(1, 2), teacher_map, False)
    torch.testing.assert_close(cosines, torch.tensor([[[1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]]]))


def test_the_frequency_view_does_not_see_what_is_the_same_everywhere():
    teacher_map = torch.randn(2, 8, 3, 3)
    tokens = (teacher_map + 7 * torch.randn(2, 8, 1, 1)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(cosine_map(tokens, teacher_map, True), torch.ones(2, 3, 3))
    assert cosine_map(tokens, teacher_map, False).mean() < 0.9
    assert frequency_mimicking_loss(tokens, teacher_map) < 1e-5


def test_looking_leaves_the_model_as_it_was(tmp_path):
    model = small_model(tmp_path, stem_norm="batch").double().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    together = agreement_maps(model, images(4).double())
    assert model.training and model.heads.training and not model.teacher.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(projector._forward_hooks for projector in model.heads.children())
    alone = agreement_maps(model, images(4).double()[:1])
    for term in FEATURE_TERMS:
        torch.testing.assert_close(alone[term], together[term][:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("teacher", "weight", "missing"), [(False, 0.1, "teacher"), (True, 0.0, "mimicking heads")])
def test_a_model_without_features_to_compare_is_refused(tmp_path, teacher, weight, missing):
    weights = {"spatial_weight": weight, "frequency_weight": weight}
    model = small_model(tmp_path, **weights) if teacher else ScaleKDModel(small_student())
    with pytest.raises(ValueError, match=f"`model` has no {missing}.*`spatial_weight` or `frequency_weight` above 0"):
        agreement_maps(model, images())


def test_training_brings_agreement_and_the_picture_shows_it(tmp_path, digits):
    config = settings(tmp_path, max_steps=40, learning_rate=2e-3, logit_weight=0.0)
    trainer = ScaleKDTrainer(small_student(), timm_swin(), config, digits)
    shown = torch.stack([trainer.train_dataset.preparation(digits[i], 0, i)["pixel_values"] for i in range(3)])
    pixel_values = trainer.model.normaliser.for_student(shown)
    before = agreement_maps(trainer.model, pixel_values)
    trainer.train()
    after = agreement_maps(trainer.model, pixel_values)
    for term in FEATURE_TERMS:
        assert after[term].mean() > before[term].mean() + 0.1, term

    file = tmp_path / "pictures" / "agreement.png"
    draw_agreement(shown, before, after, file)
    with Image.open(file) as picture:
        assert picture.format == "PNG" and 1200 <= picture.width <= 2400 and 500 <= picture.height <= 1200
        pixels = np.asarray(picture.convert("RGB"))
    border = np.concatenate([pixels[[0, -1]].reshape(-1, 3), pixels[:, [0, -1]].reshape(-1, 3)])
    assert (border == 255).all()  # nothing is cut off
    draw_agreement(shown, after, before, tmp_path / "exchanged.png")
    exchanged = np.asarray(Image.open(tmp_path / "exchanged.png").convert("RGB"))
    assert 0.05 < (pixels != exchanged).any(-1).mean()


def test_maps_that_do_not_belong_together_are_refused(tmp_path):
    shown, maps = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {"last_spatial": torch.zeros(2, 4, 4)}
    with pytest.raises(ValueError, match=r"`before` has maps of \['last_spatial'\] and `after` of \[\]"):
        draw_agreement(shown, maps, {}, tmp_path / "picture.png")
    with pytest.raises(ValueError, match="`before` has 2 maps of 'last_spatial' for 1 `images`"):
        draw_agreement(shown[:1], maps, maps, tmp_path / "picture.png")


@pytest.fixture(scope="module")
def unmoved(tmp_path_factory):
    """Output folder of a real run whose learning rate is 0, so that before and after are the same."""
    folder = tmp_path_factory.mktemp("run")
    words = ["--output_dir", folder, "--max_steps", 1, "--learning_rate", 0, "--stem_norm", "layer", "--use_cpu"]
    words += ["--baseline", "false", "--save_strategy", "steps", "--save_steps", 1, "--student", "timm/convnext_atto"]
    words += ["--student_args", '{"patch_size": 2, "depths": [1, 1, 2, 1], "dims": [8, 12, 16, 24]}']  # no BatchNorm
    result = run_script("recipes/distill.py", *words)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def table(result):
    """Term, before and after, of each row that the recipe printed."""
    assert result.returncode == 0, result.stderr[-3000:]
    return [line.split() for line in result.stdout.splitlines() if line.startswith(FEATURE_TERMS)]


@pytest.mark.slow
def test_the_recipe_compares_the_run_with_its_beginning(unmoved, tmp_path):
    words = [unmoved / "config_resolved.yaml", "--checkpoint", unmoved / "checkpoint-1", "--images", 2]
    rows = table(run_script(RECIPE, *words))
    assert [row[0] for row in rows] == list(FEATURE_TERMS)
    assert all(before == after and -1 < float(after) < 1 for _, before, after in rows)
    with Image.open(unmoved / "agreement.png") as picture:
        assert picture.format == "PNG"

    file = tmp_path / "other.png"
    other = table(run_script(RECIPE, *words, "--seed", 1, "--output", file, "--streaming", "false"))
    assert all(before != after for _, before, after in other)  # the beginning of another run
    assert [row[2] for row in other] == [row[2] for row in rows]
    assert file.exists()


def test_the_recipe_says_what_is_wrong(unmoved, tmp_path):
    good = unmoved / "checkpoint-1"
    for words, message in [
        (["--checkpoint", unmoved], f"`--checkpoint` is '{unmoved}', which has no {HEADS_FILE}"),
        (["--checkpoint", unmoved], f"in this one: {good}"),
        (["--checkpoint", tmp_path / "none"], "which is not a folder. Give a `checkpoint-N` folder"),
        (
            ["--checkpoint", good, "--student_taps", "stages.0", "stages.1"],
            "it would be tapped at stages.0, stages.1 now",
        ),
        (["--checkpoint", good, "--images", 0], "`--images` is 0, and a picture needs at least 1"),
        (["--checkpoint", good, "--images", 1001], "`--images` is 1001, but the evaluation data holds 1000"),
    ]:
        result = run_script(RECIPE, unmoved / "config_resolved.yaml", *words)
        assert result.returncode != 0 and message in result.stderr, result.stderr[-2000:]
    settings = yaml.safe_load((unmoved / "config_resolved.yaml").read_text())
    del settings["eval_files"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    result = run_script(RECIPE, tmp_path / "config.yaml", "--checkpoint", good)
    assert "`eval_split` is 'none' or `eval_files` are missing: there are none. Name either" in result.stderr
