"""The house: what may import what, what is borrowed of other libraries, and how large a room may be."""

import ast
import inspect
import re
import sys

import datasets
import pytest
import timm
from helpers import DIGITS, ROOT
from processes import in_child
from scripts.private_names import borrowed
from transformers import Trainer
from transformers.integrations import deepspeed as hf_deepspeed

import scalekd_hf.borrowed.datasets as borrowed_of_datasets
from scalekd_hf.borrowed.timm import IMAGENET_INFO, construction_arguments
from scalekd_hf.borrowed.transformers import whole_models


SOURCE = ROOT / "src" / "scalekd_hf"
# Each name, and what is lost where a release of its library changes it.
BORROWED = {
    "borrowed/datasets.py": {
        "_indices": "a selection of other rows of the same table is not known for another data set",
        "_ex_iterable": "a stream's files: it is counted by reading it whole, and its own shuffle stays in it",
        "datasets.utils.file_utils.xopen": "files on the Hub, behind a proxy or in an archive cannot be read",
    },
    "borrowed/timm.py": {
        "_model_args": "the drop rates that a student was built with are not saved with it",
        "timm.models._hub.save_config_for_hf": "a student's config.json cannot be written without its weights",
        "timm.data/_info": "the class lists of ImageNet-A and -R, and reassessed labels, must be given as files",
    },
    "borrowed/transformers.py": {
        "_commit_hash": "a card does not say which revision of a model it is about",
        "_hf_deepspeed_config_weak_ref": "under ZeRO-3 the dry runs see models whose parameters are empty",
    },
    "method/distiller.py": {
        "Module._apply": "the teacher does not move with the model that it teaches",
    },
    "transfer/mask_rcnn.py": {
        "PreTrainedModel._init_weights": "a new Mask R-CNN starts with transformers' weights in place of torchvision's",
    },
    "transfer/student_backbone.py": {
        "PreTrainedModel._init_weights": "after loading, a Swin's or BEiT's indices of positions are what was in memory",
    },
    "training/model.py": {
        "_keys_to_ignore_on_save": "FSDP cannot load the best model at the end",
    },
    "training/run_trainer.py": {
        "Trainer._created_lr_scheduler": "a second call of `train` goes on with the first one's milestones",
        "Trainer._save_checkpoint": "checkpoints lack the heads, and are not whole or not there",
        "Trainer._get_output_dir": "checkpoints are written in place: a process that dies leaves half of one",
        "Trainer._push_from_checkpoint": "a checkpoint is pushed before it is whole",
        "Trainer._evaluate": "an evaluation that a signal cut short is not made up for",
        "Trainer._finalize_training": "a stopped run loses its last checkpoint where the best alone is kept",
        "Trainer._determine_best_metric": "one that was made up for takes no part in choosing the best model",
        "Trainer._load_rng_state": "after one that was made up for, random numbers are others",
        "Trainer._load_from_checkpoint": "a run that has come to its end is not loaded as it ended",
        "Trainer._load_best_model": "nor with its best model",
    },
    "training/trainer.py": {
        "Trainer._load_from_checkpoint": "a run does not go on from its weights",
        "Trainer._load_best_model": "the best model is not loaded at the end",
    },
    "transfer/trainer.py": {
        "Trainer._load_from_checkpoint": "a transfer goes on from weights that are loaded in part, without a word",
        "Trainer._load_best_model": "and so is its best model",
    },
}


def test_what_is_borrowed_is_known():
    found = borrowed(SOURCE)
    assert {file: set(names) for file, names in found.items()} == {f: set(names) for f, names in BORROWED.items()}


def test_streams_still_tell_what_they_are_made_of(digits_stream):
    lost = f"datasets {datasets.__version__}: {BORROWED['borrowed/datasets.py']['_ex_iterable']}"
    kinds = borrowed_of_datasets.IN_SHARD_ORDER | borrowed_of_datasets.SHUFFLED | borrowed_of_datasets.PASSED_ON
    missing = [kind for kind in kinds if not hasattr(datasets.iterable_dataset, kind)]
    assert not missing, f"{lost}; there is no {missing} any more"
    assert borrowed_of_datasets.has_rows_in_shard_order(digits_stream), lost
    shuffled = [digits_stream.shuffle(seed=0, max_buffer_input_shards=shards) for shards in (1, 2)]
    for other in (digits_stream.take(3), digits_stream.skip(3), *shuffled, shuffled[0].map(lambda row: row)):
        assert not borrowed_of_datasets.has_rows_in_shard_order(other), lost
    assert borrowed_of_datasets.has_rows_in_shard_order(
        digits_stream.map(lambda row: row).select_columns(["label"])
    ), lost
    files = sorted(str(file) for file in DIGITS.glob("train-*.parquet"))
    assert [file for file, _ in borrowed_of_datasets.parquet_row_groups(digits_stream)] == files, lost
    filtered = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True, filters=[("label", "=", 3)]
    )
    assert borrowed_of_datasets.parquet_row_groups(filtered) is None, f"{lost}; filters are not seen"
    shuffled = digits_stream.shuffle(seed=1, buffer_size=50)
    unshuffled = borrowed_of_datasets.unshuffled(shuffled)
    first = next(iter(digits_stream.remove_columns("image")))["label"]
    assert next(iter(unshuffled))["label"] == first and unshuffled.features == digits_stream.features, lost


def test_timm_still_tells_how_a_model_was_built():
    model = timm.create_model("convnext_atto", depths=(1, 1, 2, 1), drop_path_rate=0.2)
    lost = f"timm {timm.__version__}: {BORROWED['borrowed/timm.py']['_model_args']}"
    assert construction_arguments(model).items() >= {"depths": (1, 1, 2, 1), "drop_path_rate": 0.2}.items(), lost
    assert len((IMAGENET_INFO / "imagenet_a_synsets.txt").read_text(encoding="utf-8").split()) == 200


def test_transformers_still_keeps_its_deepspeed_configuration_where_it_was():
    class Configuration:
        config = {"zero_optimization": {"stage": 3}}

        def is_zero3(self):
            return True

    configuration = Configuration()
    hf_deepspeed.set_hf_deepspeed_config(configuration)
    try:
        assert hf_deepspeed.is_deepspeed_zero3_enabled()
        with whole_models():
            assert not hf_deepspeed.is_deepspeed_zero3_enabled()
        assert hf_deepspeed.is_deepspeed_zero3_enabled(), BORROWED["borrowed/transformers.py"]
    finally:
        hf_deepspeed.unset_hf_deepspeed_config()


HOOKS = BORROWED["training/run_trainer.py"] | BORROWED["training/trainer.py"]


@pytest.mark.parametrize("name", sorted(set(HOOKS) - {"Trainer._created_lr_scheduler"}))
def test_the_parent_still_calls_the_hooks_that_are_overridden(name):
    hook = name.removeprefix("Trainer.")
    ours, theirs = (list(inspect.signature(getattr(cls, hook)).parameters) for cls in (scalekd_trainer(), Trainer))
    lost = HOOKS[name]
    assert ours == theirs, f"`{name}` takes {theirs} now: {lost}"
    assert f"self.{hook}(" in inspect.getsource(Trainer), f"`{name}` is not called any more: {lost}"


def scalekd_trainer():
    from scalekd_hf import ScaleKDTrainer

    return ScaleKDTrainer


def test_rooms_are_small():
    lines = {
        str(file.relative_to(SOURCE)): len(file.read_text(encoding="utf-8").splitlines())
        for file in SOURCE.rglob("*.py")
    }
    assert lines["training/trainer.py"] <= 350
    beside = [file for name in ("tests", "benchmarks", "recipes") for file in (ROOT / name).rglob("*.py")]
    lines |= {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in beside}
    assert not {file: count for file, count in lines.items() if count > 400}


def test_the_picture_of_the_house_shows_every_room():
    picture = (ROOT / "docs" / "house.svg").read_text(encoding="utf-8")
    rooms = {file.stem for file in SOURCE.rglob("*.py")} | {
        folder.name for folder in SOURCE.iterdir() if folder.is_dir()
    }
    missing = [room for room in rooms - {"__init__", "__pycache__"} if not re.search(rf"\b{room}\b", picture)]
    assert not missing, f"docs/house.svg does not show {missing}"


UNIX_ONLY = {"fcntl", "grp", "posix", "pwd", "resource", "termios", "tty"}
UNIX_CALLS = {
    "fork",
    "forkpty",
    "getpgid",
    "getuid",
    "killpg",
    "mkfifo",
    "nice",
    "setpgid",
    "setsid",
    "sysconf",
    "uname",
}
UNIX_CALLS |= {"sched_getaffinity", "SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "alarm", "pause"}


def test_nothing_that_windows_lacks_is_needed_to_import_the_package(tmp_path):
    # What the package itself imports is there already: other libraries know their platforms.
    def import_without():
        import os

        for name in [name for name in sys.modules if name.split(".")[0] == "scalekd_hf"]:
            del sys.modules[name]
        for name in UNIX_ONLY:
            sys.modules[name] = None
        for name in [name for name in dir(os) if name.startswith("EX_")] + ["fork", "setpgid", "killpg"]:
            delattr(os, name)
        for file in SOURCE.rglob("*.py"):
            module = ".".join(("scalekd_hf", *file.relative_to(SOURCE).with_suffix("").parts))
            __import__(module.removesuffix(".__init__"))

    outcome = in_child(tmp_path, import_without)
    assert outcome.status == 0, outcome.text[-3000:]


def test_nothing_that_windows_lacks_is_used():
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("os", "signal")
            ):
                unix = node.attr.startswith("EX_") or node.attr in UNIX_CALLS
                assert not unix, f"{file}: {node.value.id}.{node.attr}"


def test_text_is_read_and_written_as_utf8_on_every_system():
    # Elsewhere than on Linux and macOS it would be what the system's settings say: cp1252, for one.
    bare = []
    for folder in (SOURCE, ROOT / "recipes", ROOT / "benchmarks"):
        for file in folder.rglob("*.py"):
            for call in (
                node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
            ):
                name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
                stated = any(keyword.arg == "encoding" for keyword in call.keywords)
                text = name in ("read_text", "write_text") or (name == "open" and not is_binary(call))
                if text and not stated:
                    bare.append(f"{file.relative_to(ROOT)}:{call.lineno}")
    assert not bare, f"no `encoding` is stated in {bare}"


def is_binary(call):
    """Whether a call of `open` is of a file of bytes, or of an image."""
    modes = [word.value for word in call.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
    return any("b" in mode for mode in modes) or getattr(getattr(call.func, "value", None), "id", "") in (
        "Image",
        "os",
    )
