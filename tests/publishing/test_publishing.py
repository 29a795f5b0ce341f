"""Publishing to a Hub on loopback with the real client, and loading back by the name of the repository."""

import json
import os
import re
import shlex

import pytest
import timm
import torch
import yaml
from helpers import TEACHER, build, images, run, settings, small_student, some_slow, timm_swin, transformers_vit
from hub_server import READ, WRITE
from huggingface_hub import ModelCard
from PIL import Image
from processes import in_processes
from safetensors.torch import load, load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ResNetConfig, pipeline

from scalekd_hf import ScaleKDTrainer, load_student, load_teacher
from scalekd_hf.manifest import seal
from scalekd_hf.publishing.hub import PushError, create_repository
from scalekd_hf.publishing.model_card import update_evaluation


LABELS = [str(number) for number in range(10)]
STUDENT = {"README.md", "config.json", "model.safetensors", "training_config.yaml", "results.json", "curves.png"}


def transformers_student():
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1, 1, 1], downsample_in_first_stage=False
    )
    config.id2label = dict(enumerate(LABELS))
    student = load_student(build(config))
    student.spec = student.spec.updated(size=32)
    return student


def trainer_for(folder, digits, student=None, **changes):
    options = {"push_to_hub": True, "hub_model_id": "me/student", "hub_token": WRITE, "max_steps": 2, **changes}
    options = {"eval_strategy": "steps", "eval_steps": 2, **options}
    torch.manual_seed(0)  # the same teacher each time
    return ScaleKDTrainer(
        student or small_student(labels=LABELS), timm_swin(), settings(folder / "run", **options), digits, digits
    )


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_what_is_pushed_is_the_student_alone_and_loads_everywhere(tmp_path, digits, hub, library):
    student = {"timm": small_student(labels=LABELS), "transformers": transformers_student()}[library]
    trainer = trainer_for(tmp_path, digits, student)
    trainer.train()
    trainer.save_model()
    files = hub.files("me/student")
    assert set(files) == STUDENT | ({"preprocessor_config.json"} if library == "transformers" else set())
    assert not any(token.encode() in content for content in files.values() for token in (WRITE, str(tmp_path)))
    weights = load(files["model.safetensors"])
    assert all(torch.equal(weights[name], tensor) for name, tensor in student.model.state_dict().items())

    model = AutoModelForImageClassification.from_pretrained("me/student", cache_dir=tmp_path / "loaded").eval()
    with torch.no_grad():
        expected = student.eval().classify(images())
        assert torch.allclose(model(images()).logits, expected, atol=1e-6)
        if library == "timm":
            loaded = timm.create_model("hf-hub:me/student", pretrained=True, cache_dir=tmp_path / "timm").eval()
            assert torch.allclose(loaded(images()), expected, atol=1e-6)
            assert load_student("hf-hub:me/student@main", pretrained=True).spec == trainer.student.spec
    AutoImageProcessor.from_pretrained("me/student", cache_dir=tmp_path / "loaded")
    predicted = trainer.predict(digits).predictions[:, 0]
    classify = pipeline("image-classification", model="me/student", top_k=1)
    for index in range(8):
        digits[index]["image"].convert("RGB").save(tmp_path / "digit.png")
        assert classify(str(tmp_path / "digit.png"))[0]["label"] == LABELS[predicted[index]]


def test_the_card_says_what_is_known_and_is_valid(tmp_path, digits, hub):
    trainer = trainer_for(tmp_path, digits, logit_weight=0.25, ema_decay=0.5, antialias=False)
    trainer.results = {"student alone": {"top1": 0.1, "top5": 0.5}}
    trainer.train()
    trainer.push_to_hub(license="mit", dataset="digits", tags="small")
    text = hub.files("me/student")["README.md"].decode()
    card = ModelCard(text)
    results = json.loads(hub.files("me/student")["results.json"])
    distilled = results["student distilled"]["top1"]
    assert card.data.license == "mit" and card.data.library_name == "timm" and "small" in card.data.tags
    assert {result.metric_name: result.metric_value for result in card.data.eval_results}["top-1"] == round(
        distilled, 6
    )
    for words in (
        "| images seen | 16 |",
        "| `logit_weight` | `0.25` |",
        "fan2024scalekd",
        "liu2021swin",
        "curves.png",
    ):
        assert words in text
    assert f"{100 * (distilled - 0.1):+.2f} points" in text.replace("\n", " ")
    assert "None" not in text and "base_model" not in text  # this teacher is nowhere on the Hub
    config = yaml.safe_load(hub.files("me/student")["training_config.yaml"])
    assert config["logit_weight"] == 0.25 and config["antialias"] is False
    assert "hub_token" not in config and "output_dir" not in config


def test_a_second_push_updates_and_a_private_repository_is_private(tmp_path, digits, hub):
    options = {"hub_private_repo": True, "hub_model_id": "team/student", "overwrite_output_dir": True}
    trainer = trainer_for(tmp_path, digits, **options)
    trainer.push_to_hub()
    first = hub.files("team/student")["model.safetensors"]
    trainer.train()
    trainer.push_to_hub(commit_message="Trained")
    assert hub.commits("team/student") == 2 and hub.files("team/student")["model.safetensors"] != first
    with pytest.raises(OSError, match="not a valid model identifier|404"):
        AutoModelForImageClassification.from_pretrained("team/student", cache_dir=tmp_path / "a", token=False)
    AutoModelForImageClassification.from_pretrained("team/student", cache_dir=tmp_path / "b", token=READ)


def test_a_new_trainer_pushes_the_student_of_an_earlier_one_and_does_not_write_over_it(tmp_path, digits, hub):
    trainer = trainer_for(tmp_path, digits, push_to_hub=False)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    saved = (tmp_path / "run" / "model.safetensors").read_bytes()
    trainer_for(tmp_path, digits, student=small_student(labels=LABELS)).push_to_hub()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == saved
    assert set(hub.files("me/student")) == STUDENT and hub.files("me/student")["model.safetensors"] == saved


def test_a_revision_is_a_branch_of_its_own(tmp_path, digits, hub):
    trainer = trainer_for(tmp_path, digits, hub_revision="try")
    trainer.push_to_hub()
    assert "model.safetensors" in hub.files("me/student", "try") and not hub.files("me/student")
    trainer.push_to_hub(revision="other")
    assert "model.safetensors" in hub.files("me/student", "other")


def test_a_token_that_may_not_write_is_refused_before_training_and_never_shown(tmp_path, digits, hub):
    with pytest.raises(ValueError, match="refuses to write to 'me/student'.*hf auth login") as error:
        trainer_for(tmp_path, digits, hub_token=READ)
    assert READ not in str(error.value)
    with pytest.raises(ValueError, match="is not the name of a repository"):
        trainer_for(tmp_path, digits, hub_model_id="me/my student")


def test_a_hub_that_fails_twice_gets_it_all(tmp_path, digits, hub, monkeypatch):
    trainer = trainer_for(tmp_path, digits)
    hub.failing = 2
    trainer.push_to_hub()
    assert "model.safetensors" in hub.files("me/student")


@pytest.mark.slow
def test_a_hub_that_dies_in_the_middle_loses_nothing_and_the_command_pushes_it_later(
    tmp_path, digits, hub, caplog, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # the client's own tries
    trainer = trainer_for(tmp_path, digits)
    trainer.train()
    hub.dying = 1000
    trainer.save_model()
    assert "Nothing is lost" in caplog.text
    with pytest.raises(PushError, match="Push it later with: hf upload me/student") as error:
        trainer.push_to_hub()
    folder = tmp_path / "run"
    AutoModelForImageClassification.from_pretrained(folder)
    hub.dying = None
    with hub:
        words = shlex.split(re.search("hf upload .*", str(error.value))[0])
        env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_TOKEN": WRITE, "HF_HOME": str(tmp_path / "home")}
        finished = run(*words, env=env)
        assert finished.returncode == 0, finished.stderr
        assert set(hub.files("me/student")) == STUDENT
        pushed = load(hub.files("me/student")["model.safetensors"])
    local = load_file(folder / "model.safetensors")
    assert all(torch.equal(pushed[name], tensor) for name, tensor in local.items())


@pytest.mark.parametrize("strategy", some_slow(["every_save", "all_checkpoints", "end", "checkpoint"], 2))
def test_checkpoints_are_pushed_as_the_strategy_says(tmp_path, digits, hub, strategy):
    options = {"save_strategy": "steps", "save_steps": 1, "hub_always_push": True, "save_total_limit": 1}
    trainer_for(tmp_path, digits, hub_strategy=strategy, **options).train()
    files = set(hub.files("me/student"))
    folders = {name.split("/")[0] for name in files if "/" in name}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-1", "checkpoint-2"}}
    assert folders == expected.get(strategy, set())
    assert ("model.safetensors" in files) == (strategy != "end")
    assert all(f"{name}/optimizer.pt" in files for name in folders)
    assert not any("training_args" in name or "bad_images" in name for name in files)
    assert not (tmp_path / "run" / "_publishing").exists()


def test_a_failing_push_while_training_is_said_and_training_goes_on(tmp_path, digits, hub, caplog, monkeypatch):
    trainer = trainer_for(tmp_path, digits, save_strategy="steps", save_steps=1)
    del hub.repos["me/student"]  # somebody has deleted it
    trainer.train()
    assert trainer.state.global_step == 2 and "hf upload me/student" in caplog.text and WRITE not in caplog.text


def test_a_card_that_somebody_has_changed_stays(tmp_path, digits, hub):
    trainer = trainer_for(tmp_path, digits, overwrite_output_dir=True)
    trainer.push_to_hub()
    mine = b"---\nlicense: mit\n---\n# Mine\n"
    hub.files("me/student")["README.md"] = mine
    trainer.train()
    trainer.push_to_hub()
    assert hub.files("me/student")["README.md"] == mine and hub.commits("me/student") == 2
    (tmp_path / "run" / "README.md").write_bytes(mine)
    trainer.create_model_card()
    assert (tmp_path / "run" / "README.md").read_bytes() == mine


def test_an_evaluation_goes_into_the_card_on_the_hub(tmp_path, digits, hub):
    trainer_for(tmp_path, digits).push_to_hub()
    row = {"dataset": "imagenet-r", "split": "test", "images": 30000, "top1": 0.5}
    assert update_evaluation("me/student", [row], token=WRITE) == "me/student"
    card = ModelCard(hub.files("me/student")["README.md"].decode())
    assert card.data.eval_results[-1].dataset_type == "imagenet-r" and "| imagenet-r, test | 50.00% |" in card.text


def test_where_the_hubs_card_cannot_be_read_it_is_not_written_over(tmp_path, digits, hub):
    trainer = trainer_for(tmp_path, digits, overwrite_output_dir=True)
    trainer.push_to_hub()
    mine = b"---\nlicense: mit\n---\n# Mine\n"
    hub.files("me/student")["README.md"] = mine
    hub.hidden = "README.md"
    with pytest.raises(PushError, match="its card cannot be read.*hf upload me/student"):
        trainer.push_to_hub()
    assert hub.files("me/student")["README.md"] == mine and hub.commits("me/student") == 1


def test_of_two_processes_one_pushes(tmp_path, digits, hub):
    def push():
        trainer = trainer_for(tmp_path, digits)
        trainer.train()
        trainer.save_model()

    for outcome in in_processes(tmp_path, push, processes=2):
        assert outcome.status == 0, outcome.text[-3000:]
    assert hub.commits("me/student") == 1 and "model.safetensors" in hub.files("me/student")


def test_the_picture_of_the_curves_shows_something(tmp_path, digits):
    trainer = trainer_for(tmp_path, digits, push_to_hub=False)
    trainer.create_model_card()
    assert not (tmp_path / "run" / "curves.png").exists()  # nothing was trained
    trainer.train()
    trainer.create_model_card()
    picture = Image.open(tmp_path / "run" / "curves.png").convert("RGB")
    assert picture.width > 1000 and len(picture.getcolors(1 << 20)) > 50


def test_the_log_on_the_screen_is_one_line_with_all_that_matters(tmp_path, digits, capsys):
    trainer = trainer_for(tmp_path, digits, push_to_hub=False)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert re.fullmatch(
        r"step 1/2 \| loss [\d.]+ \| task [\d.]+ logit [\d.]+ penultimate_spatial [\d.]+ penultimate_frequency [\d.]+ "
        r"last_spatial [\d.]+ last_frequency [\d.]+ \| rate 0.001 \| [\d,]+ images/s \|( \d+% waiting for data \|)? "
        r"\d:\d\d:\d\d left",
        lines[0],
    )
    assert re.match(
        r"step 2/2 \| evaluation of timm/convnext_atto: loss [\d.]+, top1 [\d.]+%, top5 [\d.]+%, runtime", lines[2]
    )


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_trackers_get_the_terms_and_write_nothing_elsewhere(tmp_path, digits, tracker, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    package = pytest.importorskip(tracker)  # reads its folder when it is imported

    def track():
        trainer = trainer_for(tmp_path, digits, push_to_hub=False, report_to=tracker)
        trainer.evaluate()
        trainer.train()
        if tracker == "wandb":
            package.finish()

    (outcome,) = in_processes(tmp_path, track)
    assert outcome.status == 0, outcome.text[-3000:]
    pattern = {"tensorboard": "events*", "wandb": "*.wandb", "trackio": "*"}[tracker]
    events = [file for file in tmp_path.rglob(pattern) if file.is_file() and not file.name.startswith("output")]
    assert events and any(b"penultimate_spatial" in file.read_bytes() for file in events)
    assert tracker != "tensorboard" or not (tmp_path / "runs").exists()


def test_a_repository_that_is_named_late_is_pushed_to(tmp_path, digits, hub):
    trainer = trainer_for(tmp_path, digits, push_to_hub=False)
    trainer.train()
    trainer.init_hf_repo()
    trainer.hub_model_id = create_repository("me/other", WRITE, None, None)
    trainer.push_to_hub()
    assert "model.safetensors" in hub.files("me/other") and not hub.files("me/student")


def test_the_card_takes_what_it_knows_and_refuses_the_rest(tmp_path, digits, hub):
    trainer = trainer_for(tmp_path, digits, push_to_hub=False)
    trainer.train()
    trainer.create_model_card("en", "mit", "small")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert (card.data.language, card.data.license) == ("en", "mit") and "small" in card.data.tags
    with pytest.raises(TypeError, match="licence"):
        trainer.push_to_hub(licence="mit")


def test_hours_of_a_finished_run_are_those_of_its_training(tmp_path, digits):
    options = {"push_to_hub": False, "save_strategy": "steps", "save_steps": 2}
    trainer_for(tmp_path, digits, **options).train()
    file = tmp_path / "run" / "checkpoint-2" / "scalekd_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": 7200.0}))
    seal(file.parent)
    again = trainer_for(tmp_path, digits, **options)
    again.train(resume_from_checkpoint=True)
    again.create_model_card()
    assert "| hours | 2 |" in (tmp_path / "run" / "README.md").read_text()


def test_whatever_fails_in_a_push_beside_training_does_not_end_it(tmp_path, digits, hub, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("the disk has gone")

    monkeypatch.setattr("scalekd_hf.publishing.publisher.upload", fail)
    trainer = trainer_for(tmp_path, digits, save_strategy="steps", save_steps=1, hub_always_push=True)
    trainer.train()
    assert trainer.state.global_step == 2 and caplog.text.count("A push has failed: the disk has gone") == 2


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_a_download_that_breaks_off_is_told_by_the_setting_that_asked_for_it(tmp_path, hub, monkeypatch, kind):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # between its tries
    folder = TEACHER if kind == "timm" else tmp_path / "vit"
    if kind == "transformers":
        transformers_vit().save_pretrained(folder)
    files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    hub.repos["me/it"] = {"private": False, "branches": {"main": {"files": files, "commits": []}}}
    hub.cut = "model.safetensors"
    name = "timm/hf-hub:me/it" if kind == "timm" else "me/it"
    with pytest.raises(
        ValueError, match=f"`teacher` '{name}' was not downloaded whole: RemoteProtocolError, peer closed"
    ):
        load_teacher(name)
    hub.cut = None
    assert load_teacher(name).grid == (4, 4)
