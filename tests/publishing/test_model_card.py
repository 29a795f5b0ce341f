"""What a card says of teachers, data and evaluations, from what is known and no more."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
from helpers import timm_swin
from huggingface_hub import ModelCard

from scalekd_hf import load_teacher
from scalekd_hf.cli.distill import evaluated_of
from scalekd_hf.publishing.model_card import CardFacts, make_card, table, update_evaluation
from scalekd_hf.publishing.provenance import Source, citations, data_source, model_source
from scalekd_hf.tools.recipe import DistillArguments


TEACHER = Source("timm/vit_large", "timm/vit_large", "0" * 40, "cc-by-nc-4.0", "vit_large_patch16_224")
DATA = Source("ILSVRC/imagenet-1k", "ILSVRC/imagenet-1k", "1" * 40)


def facts(**changes):
    options = {"repo": "me/small", "library": "timm", "student": Source("timm/resnet50"), "parameters": 25_557_032}
    return CardFacts(**{**options, "num_labels": 1000, "teacher": TEACHER, "data": DATA, "evaluated": DATA, **changes})


def test_metadata_names_teacher_data_and_results():
    results = {"student alone": {"top1": 0.7}, "student distilled": {"top1": 0.75, "top5": 0.92}}
    card = make_card(
        facts(results=results, evaluated=dataclasses.replace(DATA, split="validation"), license="apache-2.0")
    )
    data = card.data.to_dict()
    assert data["base_model"] == "timm/vit_large" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == "ILSVRC/imagenet-1k" and data["license"] == "apache-2.0"
    (result, _) = card.data.eval_results
    assert (result.dataset_type, result.dataset_split, result.dataset_revision) == (
        DATA.hub_id,
        "validation",
        "1" * 40,
    )
    assert "+5.00 points" in card.text.replace("\n", " ") and 'timm.create_model("hf-hub:me/small"' in card.text
    assert ModelCard(str(card)).data.to_dict() == data  # as the Hub reads it


def test_a_license_that_restricts_is_named_and_others_are_not():
    assert "`cc-by-nc-4.0`" in make_card(facts()).text
    assert "restrict" not in make_card(facts(teacher=Source("t", "a/t", None, "mit", "vit"))).text
    for license, warns in (
        ("apache-2.0", False),
        ("cc-by-nc-sa-4.0", True),
        ("dinov3-license", True),
        (None, False),
        ("seer-license", True),
        ("bsd-3-clause", False),
    ):
        assert bool(Source("t", license=license).restriction) == warns


def test_what_is_not_known_is_left_out():
    card = make_card(facts(teacher=Source("mine"), data=None, results={}))
    for word in ("None", "base_model", "datasets", "license", "model-index", "metrics", "## Evaluation"):
        assert word not in str(card)


def test_students_that_began_with_weights_name_them():
    student = Source("timm/resnet50", "timm/resnet50.a1_in1k")
    card = make_card(facts(student=student, student_pretrained=True))
    assert card.data.base_model == ["timm/resnet50.a1_in1k", "timm/vit_large"]


def test_what_nobody_can_load_and_what_differs_between_the_arms_is_said():
    results = {"student alone": {"top1": 0.7}, "student distilled": {"top1": 0.75}}
    text = make_card(
        facts(teacher=Source("teacher", is_local=True), results=results, baseline_args={"learning_rate": 0.02})
    ).text
    assert "`teacher` (not published)" in text
    assert "and settings but its own `learning_rate` 0.02, distillation changed" in text.replace("\n", " ")
    assert "not published" not in make_card(facts(teacher=Source("timm/vit_tiny_patch16_224"), results=results)).text


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("swin_large_patch4_window7_224", "liu2021swin"),
        ("swinv2_base_window12", "liu2022swinv2"),
        ("vit_small_patch14_dinov2", "oquab2023dinov2"),
        ("eva02_large_patch14_448", "fang2023eva02"),
        ("ViTForImageClassification", "dosovitskiy2021vit"),
        ("vit_base_patch16_siglip_224", "zhai2023siglip"),
    ],
)
def test_the_teachers_paper_is_cited(architecture, key):
    text = citations(architecture)
    assert key in text and "fan2024scalekd" in text and text.count("@") == 2


def test_no_teacher_is_cited_that_is_not_known():
    assert citations("SomethingNew").count("@") == citations(None).count("@") == 1


def test_the_origin_of_models_is_what_their_configuration_says(tmp_path):
    module = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, embed_dim=12, depths=(1, 1, 1, 1))
    teacher = load_teacher(module)
    assert model_source(teacher).hub_id is None  # built by the user
    teacher.name = "timm/swin_tiny_patch4_window7_224"
    source = model_source(teacher)
    assert source.license == "mit" and source.hub_id == "timm/swin_tiny_patch4_window7_224.ms_in1k"
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    teacher = load_teacher(timm_swin())
    teacher.name = str(tmp_path)
    assert model_source(teacher).license == "cc-by-4.0" and model_source(teacher).name == tmp_path.name


def test_the_revision_of_the_data_is_read_where_rows_come_from_the_hub(digits):
    class Info:
        download_checksums = {f"hf://datasets/me/data@{'a' * 40}/train.parquet": {}}
        license = ""

    class Rows:
        info = Info()

    assert data_source(Rows()) == Source("me/data", "me/data", "a" * 40)
    assert data_source(digits) is None


def test_an_evaluation_is_put_in_the_card_and_updated(tmp_path):
    card = make_card(facts(results={"student distilled": {"top1": 0.75}}))
    card.save(tmp_path / "README.md")
    row = {
        "dataset": "imagenet-a",
        "split": "test",
        "images": 7500,
        "top1": 0.25,
        "top5": 0.5,
        "nll": 3.25,
        "ece": 0.125,
    }
    for top1 in (0.2, 0.25):
        update_evaluation(str(tmp_path), [{**row, "top1": top1}])
    text = Path(tmp_path, "README.md").read_text()
    assert "| imagenet-a, test | 25.00% | 50.00% | 3.2500 | 12.50% |" in text and "20.00%" not in text
    results = ModelCard(text).data.eval_results
    assert len(results) == 5 and {result.dataset_type for result in results} == {"imagenet-a", DATA.hub_id}
    assert text.count("<!-- evaluation -->") == 1 and "## Limits" in text
    with pytest.raises(ValueError, match="has no README.md"):
        update_evaluation(str(tmp_path.parent), [row])


def test_a_table_has_the_columns_that_are_known():
    assert table("data", {}) == ""
    assert table("data", {"a": {"top1": 0.5}, "b": {"nll": 1.0}}).splitlines()[2:] == [
        "| a | 50.00% |  |",
        "| b |  | 1.0000 |",
    ]


def test_a_card_says_that_lighter_stems_are_a_departure():
    assert "a departure from ScaleKD as published" in make_card(facts(settings={"stem": "shared"})).text
    assert "departure" not in make_card(facts(settings={"temperature": 2.0})).text


def test_evaluations_of_other_configurations_sources_and_features_stand_beside_each_other(tmp_path):
    make_card(facts(results={"student distilled": {"top1": 0.75}})).save(tmp_path / "README.md")
    row = {"dataset": "me/corrupted", "source": "me/corrupted", "split": "test", "top1": 0.9}
    rows = [row | {"config": "blur"}, row | {"config": "snow", "top1": 0.2}]
    v2 = {"dataset": "imagenet-v2", "split": "test"}
    rows += [v2 | {"source": name, "top1": top1} for name, top1 in (("matched", 0.6), ("top", 0.7))]
    update_evaluation(str(tmp_path), rows)
    update_evaluation(str(tmp_path), rows[:1])
    text = Path(tmp_path, "README.md").read_text()
    for line in (
        "me/corrupted, blur, test | 90.00%",
        "me/corrupted, snow, test | 20.00%",
        "imagenet-v2, matched, test | 60.00%",
        "imagenet-v2, top, test | 70.00%",
    ):
        assert text.count(f"| {line} |") == 1, line
    configs = {(result.dataset_type, result.dataset_config) for result in ModelCard(text).data.eval_results}
    assert {("me/corrupted", "blur"), ("me/corrupted", "snow")} < configs


def test_figures_are_filed_under_what_was_evaluated(tmp_path):
    arguments = DistillArguments(dataset="me/photos", student="s", teacher="t", eval_split="0.1")
    assert evaluated_of(arguments, None) == Source("me/photos", "me/photos", split="0.1 held out of train")
    other = dataclasses.replace(arguments, eval_split="validation", eval_files=str(tmp_path / "mine" / "*.parquet"))
    assert evaluated_of(other, None) == Source("mine", is_local=True)
    known = Source("me/photos", "me/photos", "2" * 40, split="test")
    assert evaluated_of(dataclasses.replace(arguments, eval_split="test"), known) == known
    results = {"student distilled": {"top1": 0.75}}
    (found,) = make_card(facts(results=results, evaluated=evaluated_of(other, None))).data.eval_results
    assert found.dataset_name == "mine" and found.dataset_revision is None
    assert make_card(facts(results=results, evaluated=None)).data.eval_results is None


def test_a_folder_that_is_named_as_timm_names_it_is_no_repository(tmp_path):
    teacher = SimpleNamespace(model=SimpleNamespace(), name=f"local-dir:{tmp_path}")
    assert model_source(teacher) == Source(tmp_path.name, architecture="SimpleNamespace", is_local=True)


def test_a_network_that_timm_lacks_is_imported_first():
    ours = Source("timm/mixer_b14_224", architecture="mixer_b14_224")
    assert "```python\nfrom scalekd_hf import mixer_b14_224  #" in make_card(facts(student=ours)).text
    theirs = Source("timm/resnet50", architecture="resnet50")
    assert "from scalekd_hf import resnet50" not in make_card(facts(student=theirs)).text
