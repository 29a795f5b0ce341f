"""Teachers of each family and library."""

import copy

import pytest
import timm
import torch
from families import BACKBONES, FAMILIES, HEADLESS, POSITION_TERMS, SWIN, VIT, large_weights
from helpers import SMALL_SWIN, images, some_slow, timm_swin, timm_vit, transformers_swin, transformers_vit
from hub_server import WRITE
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from timm.models.eva import EvaAttention
from transformers import (
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2ImageProcessor,
    Siglip2VisionModel,
    SwinConfig,
    SwinForMaskedImageModeling,
    ViTMAEModel,
)
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

from scalekd_hf import load_teacher
from scalekd_hf.models.maps import first_tensor
from scalekd_hf.publishing.hub import create_repository, upload


def entering_tokens(teacher, pixel_values):
    """What enters the last stage as (B, P + N_p, D_p), the last map and the logits."""
    seen = []
    module = teacher.model.get_submodule(teacher.taps[0].module)
    hook = module.register_forward_hook(lambda module, args, output: seen.append(output))
    last_map, logits = teacher(pixel_values)
    hook.remove()
    return teacher.taps[0].as_tokens(seen[0]), last_map, logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_stage_applied_to_its_own_tokens_gives_the_last_map(family):
    model = large_weights(FAMILIES[family]()).eval()
    teacher = load_teacher(model)
    pixel_values = torch.randn(2, 3, *teacher.spec.size)
    tokens, last_map, logits = entering_tokens(teacher, pixel_values)
    assert last_map.shape == (2, teacher.dim, *teacher.grid)
    if family in HEADLESS:
        assert logits is None
    else:
        outputs = model(pixel_values)
        assert torch.equal(logits, getattr(outputs, "logits", outputs))

    prefix = tokens.shape[1] - teacher.penultimate_grid[0] * teacher.penultimate_grid[1]
    expected = last_map.flatten(2).transpose(1, 2)
    scale = expected.abs().max()
    assert (teacher.last_stage(tokens)[:, prefix:] - expected).abs().max() < 1e-5 * scale
    moved = teacher.last_stage(tokens + torch.randn_like(tokens))[:, prefix:]
    assert (moved - expected).abs().max() > 1e-2 * scale  # the weights are such that an error would show
    if prefix:  # the published method runs the last stage on patch tokens alone
        alone = teacher.last_stage(tokens[:, prefix:])
        assert alone.shape == expected.shape
        assert (alone - expected).abs().max() > 1e-3 * scale


def without_prefix(model):
    """A copy of a model whose blocks take patch tokens alone, with the position terms of the patches."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, EvaAttention):
            module.num_prefix_tokens = 0
        if hasattr(module, "_get_rel_pos_bias"):
            whole = module._get_rel_pos_bias
            module._get_rel_pos_bias = lambda whole=whole: whole()[:, :, 1:, 1:]
        if isinstance(module, BeitRelativePositionBias):
            forward = module.forward
            module.forward = lambda *args, forward=forward, **kwargs: forward(*args, **kwargs)[..., 1:, 1:]
    return model


@pytest.mark.parametrize("family", POSITION_TERMS)
def test_patch_tokens_alone_get_the_position_terms_of_the_patches(family):
    model = large_weights(FAMILIES[family]()).eval()
    teacher = load_teacher(model)
    entering, last = (tap.module for tap in teacher.taps)
    path, _, index = entering.rpartition(".")
    given = []
    block = model.get_submodule(path)[int(index) + 1]
    block.register_forward_pre_hook(lambda module, args, options: given.append((args, options)), with_kwargs=True)
    tokens, *_ = entering_tokens(teacher, torch.randn(2, 3, *teacher.spec.size))
    (_, *positions), options = given[0]
    if family == "timm_beit_shared_bias":
        options = {"shared_rel_pos_bias": options["shared_rel_pos_bias"][..., 1:, 1:]}
    patches = expected = tokens[:, -16:]
    with torch.no_grad():
        bare = without_prefix(model)
        for block in bare.get_submodule(path)[int(index) + 1 :]:
            expected = first_tensor(block(expected, *positions, **options))
        if last != f"{path}.3":
            expected = bare.get_submodule(last)(expected)
        actual = teacher.last_stage(patches)
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", some_slow(FAMILIES, 12))
def test_gradients_pass_through_the_last_stage_and_leave_none_in_it(family):
    teacher = load_teacher(FAMILIES[family]())
    count = teacher.penultimate_grid[0] * teacher.penultimate_grid[1]
    tokens = torch.randn(2, count, teacher.penultimate_dim, requires_grad=True)
    teacher.last_stage(tokens).square().sum().backward()
    assert tokens.grad.abs().sum() > 0 and torch.isfinite(tokens.grad).all()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    teacher.train()
    assert not any(module.training for module in teacher.modules())


def test_stochastic_depth_of_the_teacher_is_a_choice():
    options = {**SMALL_SWIN, "num_classes": 10, "pretrained": False}
    teacher = load_teacher("timm/swin_tiny_patch4_window7_224", drop_path=0.5, **options).train()
    modes = {type(module).__name__: module.training for module in teacher.modules()}
    assert modes["DropPath"] and not modes["SwinTransformer"] and not modes["Dropout"]
    batch = images(16)
    assert not torch.equal(teacher(batch)[0], teacher(batch)[0])
    teacher.eval()
    assert torch.equal(teacher(batch)[0], teacher(batch)[0])
    with pytest.raises(ValueError, match="`teacher_drop_path` is 0.1, but.*no stochastic depth"):
        load_teacher(timm_vit(), drop_path=0.1)


@pytest.mark.parametrize("family", ["timm_swin", "transformers_swin"])
def test_swin_grids_and_widths_are_those_before_and_after_the_merging(family):
    teacher = load_teacher(FAMILIES[family]())
    assert (teacher.penultimate_grid, teacher.penultimate_dim) == ((8, 8), 24)
    assert (teacher.grid, teacher.dim) == ((4, 4), 48)


@pytest.mark.parametrize(
    ("model", "grids"),
    [
        (lambda: timm_swin(img_size=64), ((16, 16), (8, 8))),
        (lambda: transformers_swin(image_size=64), ((16, 16), (8, 8))),
        (lambda: timm_vit(img_size=48), ((6, 6), (6, 6))),
        (lambda: transformers_vit(image_size=(48, 32)), ((6, 4), (6, 4))),
    ],
)
def test_grids_at_other_sizes_come_from_the_model(model, grids):
    teacher = load_teacher(model())
    assert (teacher.penultimate_grid, teacher.grid) == grids
    assert teacher(torch.randn(1, 3, *teacher.spec.size))[0].shape[2:] == grids[1]


def test_full_size_teachers_have_the_published_widths_and_grids():
    with torch.device("meta"):
        swin = timm.create_model("swin_large_patch4_window7_224", num_classes=0)
        vit = timm.create_model("vit_large_patch16_224", num_classes=0)
    swin, vit = load_teacher(swin), load_teacher(vit)
    assert (swin.penultimate_dim, swin.penultimate_grid, swin.dim, swin.grid) == (768, (14, 14), 1536, (7, 7))
    assert (vit.penultimate_dim, vit.penultimate_grid, vit.dim, vit.grid) == (1024, (14, 14), 1024, (14, 14))
    assert swin.num_labels == 0


def test_a_teacher_without_head_gives_no_logits():
    assert load_teacher(timm_swin(num_classes=0))(images())[1] is None


def test_last_blocks_is_a_setting_of_plain_teachers():
    teacher = load_teacher(timm_vit(), last_blocks=3)
    assert teacher.taps[0].module == "blocks.0"
    with pytest.raises(
        ValueError, match="`teacher_last_blocks` must be between 1 and 3, one less than the blocks.*got 4"
    ):
        load_teacher(timm_vit(), last_blocks=4)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("timm/swin_tiny_patch4_window8_224", "swin_tiny_patch4_window7_224"),
        ("no-such-team/no-such-model", "neither a local folder"),
        (torch.nn.Linear(2, 2), "`teacher` is a Linear that does not run on images"),
        (lambda: timm.create_model("crossvit_tiny_240", num_classes=10), "teacher.*teacher_taps"),
        (lambda: transformers_swin(image_size=33), "patches of 2x2 px.*33x33"),
        (lambda: timm_vit(img_size=36), "patches of 8x8 px.*36x36"),
    ],
)
def test_unsuitable_teachers_are_refused_with_the_reason(teacher, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(
            teacher() if callable(teacher) and not isinstance(teacher, torch.nn.Module) else teacher, pretrained=False
        )


@pytest.mark.parametrize("build", [timm_swin, timm_vit])
def test_a_use_of_the_model_on_the_side_leaves_no_map_behind(build):
    teacher = load_teacher(build())
    first, second = images(2, 32), images(2, 32) + 1
    with torch.no_grad():
        expected = teacher(second)[0]
        teacher.model(first)
        assert torch.equal(teacher(second)[0], expected)


def last_tokens(model, pixel_values):
    """What a backbone of transformers puts out, through its own front door."""
    if isinstance(model, ViTMAEModel):
        model.config.mask_ratio = 0.0
        return model(pixel_values, noise=torch.arange(16.0).expand(len(pixel_values), 16)).last_hidden_state
    if isinstance(model, Siglip2VisionModel):
        size = {"patch_size": 8, "max_num_patches": 16}
        options = {"do_normalize": False, "do_rescale": False, "do_resize": False, "return_tensors": "pt"}
        given = Siglip2ImageProcessor(**size)(list(pixel_values), **options)
        return model(**given).last_hidden_state
    return getattr(model, "vision_model", model)(pixel_values).last_hidden_state


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_as_the_hub_has_it_teaches_without_a_head(name, tmp_path):
    model = BACKBONES[name]().eval()
    model.save_pretrained(tmp_path)
    by_folder, by_module = load_teacher(str(tmp_path)), load_teacher(model)
    pixel_values = torch.randn(2, 3, *by_folder.spec.size)
    last_map, logits = by_folder(pixel_values)
    assert logits is None and by_folder.num_labels == 0 and by_folder.labels is None
    assert torch.equal(last_map, by_module(pixel_values)[0])
    with torch.no_grad():
        tokens = last_tokens(model, pixel_values)
    if tokens.ndim == 4:
        assert torch.equal(last_map, tokens)
    else:
        patches = last_map.flatten(2).transpose(1, 2)
        assert (patches - tokens[:, -patches.shape[1] :]).abs().max() < 1e-5 * tokens.abs().max()


def test_a_checkpoint_without_a_head_never_becomes_a_classifier_with_a_random_one(tmp_path, caplog):
    swin = transformers_swin()
    swin.swin.save_pretrained(tmp_path / "backbone")  # as `SwinModel.save_pretrained` does
    assert load_teacher(str(tmp_path / "backbone")).num_labels == 0
    swin.save_pretrained(tmp_path / "whole")
    assert load_teacher(str(tmp_path / "whole")).num_labels == 10

    weights = load_file(tmp_path / "whole" / "model.safetensors")
    headless = {name: value for name, value in weights.items() if "classifier" not in name}
    save_file(headless, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    caplog.clear()
    assert load_teacher(str(tmp_path / "whole")).num_labels == 0  # its configuration says otherwise
    assert "lacks classifier.bias, classifier.weight: it has no trained classifier" in caplog.text

    lost = "swin.encoder.layers.1.blocks.0.layernorm_before.weight"
    del headless[lost]
    save_file(headless, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match="its checkpoint lacks the weights.*layernorm_before.weight.*would teach noise"
    ):
        load_teacher(str(tmp_path / "whole"))


def test_a_timm_teacher_with_other_classes_than_it_was_trained_on_is_refused(tmp_path):
    saved = timm_vit(num_classes=5)
    save_for_hf(saved, tmp_path)
    assert load_teacher(str(tmp_path)).num_labels == 5
    backbone = load_teacher(str(tmp_path), num_classes=0)
    assert backbone.num_labels == 0
    pixel_values = torch.randn(1, 3, *backbone.spec.size)
    assert torch.equal(backbone(pixel_values)[0], load_teacher(saved)(pixel_values)[0])
    with pytest.raises(
        ValueError, match="classifier of 5 classes, but `num_classes` 7 asks for a new one.*teach noise"
    ):
        load_teacher(str(tmp_path), num_classes=7)


def test_position_terms_of_each_block_are_its_own():
    model = large_weights(
        timm.create_model("vit_small_patch16_rope_mixed_224", img_size=64, depth=4, embed_dim=48, num_heads=4)
    )
    teacher = load_teacher(model)
    tokens, last_map, _ = entering_tokens(teacher, torch.randn(2, 3, 64, 64))
    expected = last_map.flatten(2).transpose(1, 2)
    assert (teacher.last_stage(tokens)[:, 1:] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_folder_of_images_in_another_order_of_tokens_is_a_map_of_the_image():
    teacher = load_teacher(timm.create_model("hiera_tiny_224", num_classes=10))
    tokens, last_map, _ = entering_tokens(teacher, torch.randn(1, 3, 224, 224))
    found = teacher.last_stage(tokens).transpose(1, 2).unflatten(2, teacher.grid)
    assert (found - last_map).abs().max() < 1e-5 * last_map.abs().max()


def test_a_backbone_on_the_hub_teaches_by_its_id(tmp_path, hub):
    model = BACKBONES["Dinov2Model"]().eval()
    model.save_pretrained(tmp_path / "dino")
    create_repository("me/dino", WRITE, None, None)
    upload("me/dino", sorted((tmp_path / "dino").iterdir()), "A backbone", token=WRITE)
    teacher = load_teacher("me/dino")
    pixel_values = torch.randn(1, 3, *teacher.spec.size)
    assert teacher.num_labels == 0 and torch.equal(teacher(pixel_values)[0], load_teacher(model)(pixel_values)[0])


def test_a_timm_checkpoint_that_timm_would_pass_over_is_not_completed_with_random_weights(tmp_path, caplog):
    model = timm.create_model("dla46x_c", num_classes=10)
    save_for_hf(model, tmp_path, safe_serialization=True)
    whole = load_file(tmp_path / "model.safetensors")
    save_file({n: w for n, w in whole.items() if not n.startswith("fc.")}, tmp_path / "model.safetensors")
    assert load_teacher(str(tmp_path), image_size=64).num_labels == 0
    assert "lacks fc.weight, fc.bias: it has no trained classifier" in caplog.text
    save_file({n: w for n, w in whole.items() if not n.startswith("level5.")}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="its checkpoint lacks the weights.*level5"):
        load_teacher(str(tmp_path), image_size=64)


def test_few_patches_behind_many_registers_are_no_larger_grid():
    config = DINOv3ViTConfig(**{**VIT, "patch_size": 16}, num_register_tokens=4)
    assert load_teacher(DINOv3ViTModel(config)).grid == (2, 2)


def test_what_a_pretraining_decodes_is_no_last_map():
    teacher = load_teacher(SwinForMaskedImageModeling(SwinConfig(**SWIN)))
    assert type(teacher.model).__name__ == "SwinModel" and teacher.dim == 48
