"""A stranger's checkpoint: nothing in it is executed when a run is to go on from it."""

import io
import json
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from foreign import Payload, works, yaml_payload
from stopped_runs import trainer_for

from scalekd_hf.cli.evaluate import parse as parse_evaluation
from scalekd_hf.cli.launcher import with_installed_files
from scalekd_hf.manifest import MANIFEST_FILE, damage
from scalekd_hf.publishing.model_card import update_evaluation
from scalekd_hf.publishing.provenance import model_source
from scalekd_hf.tools.words import read_config
from scalekd_hf.training.pickles import check_pickles


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("run")
    trainer_for(folder, shards, max_steps=2, save_steps=2).train()
    (folder / "checkpoint-2" / MANIFEST_FILE).unlink()  # a stranger's fits what they have put in
    return folder / "checkpoint-2"


FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.parametrize(("name", "legacy"), [*((name, False) for name in FILES), ("optimizer.pt", True)])
def test_no_pickle_of_a_checkpoint_is_executed(tmp_path, shards, checkpoint, name, legacy):
    mark, theirs = tmp_path / "mark", tmp_path / "run" / "checkpoint-2"
    assert works(mark)
    shutil.copytree(checkpoint, theirs)
    torch.save({"state": Payload(mark)}, theirs / name, _use_new_zipfile_serialization=not legacy)
    with pytest.raises((ValueError, pickle.UnpicklingError)) as told:
        trainer_for(tmp_path / "run", shards, max_steps=3).train(resume_from_checkpoint=str(theirs))
    assert not mark.exists()
    if name != "rng_state.pth":
        assert f"{name} is missing or damaged (it is damaged, or holds more than tensors" in str(told.value)


def test_files_that_no_run_reads_are_not_executed(tmp_path, shards, checkpoint):
    mark, theirs = tmp_path / "mark", tmp_path / "run" / "checkpoint-2"
    shutil.copytree(checkpoint, theirs)
    names = (
        "training_args.bin",
        "pytorch_model.bin",
        "random_states_0.pkl",
        "rng_state_0.pth",
        "custom_checkpoint_0.pkl",
    )
    for name in names:
        torch.save(Payload(mark), theirs / name)
    (theirs / "README.md").write_text(f"---\nlicense: {yaml_payload(mark)}\n---\n")
    (theirs / "training_config.yaml").write_text(f"seed: {yaml_payload(mark)}\n")
    trainer = trainer_for(tmp_path / "run", shards, max_steps=3)
    trainer.train(resume_from_checkpoint=str(theirs))
    assert trainer.state.global_step == 3 and not mark.exists()


def test_what_engines_would_execute_is_refused_before_they_see_it(tmp_path, shards, checkpoint, caplog):
    mark, theirs = tmp_path / "mark", tmp_path / "run" / "checkpoint-2"
    shutil.copytree(checkpoint, theirs)
    for name in ("optimizer.pt", "scheduler.pt"):
        (theirs / name).unlink()
    parts = theirs / "global_step2"
    parts.mkdir()
    torch.save({"optimizer_state_dict": Payload(mark)}, parts / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (theirs / "latest").write_text("global_step2")
    trainer = trainer_for(tmp_path / "run", shards, max_steps=3, allow_data_mismatch=True)
    with pytest.raises(ValueError, match=r"global_step2/zero_pp.*' pickles posix.mkdir, which no run of ours writes"):
        trainer.train(resume_from_checkpoint=str(theirs))
    shutil.rmtree(parts)

    def saved(**state):
        shutil.rmtree(theirs / "optimizer_0", ignore_errors=True)
        dcp.save(state, checkpoint_id=theirs / "optimizer_0", no_dist=True)
        return theirs / "optimizer_0" / ".metadata"

    saved(weight=torch.zeros(2, 3), half=torch.zeros(2, dtype=torch.bfloat16), step=3, names=["a"])
    check_pickles(theirs)
    saved(weight=torch.zeros(2), state=Payload(mark))
    with pytest.raises(ValueError, match=r"optimizer_0/__0_0.distcp' pickles posix.mkdir"):
        check_pickles(theirs)
    for content in (pickle.dumps(Payload(mark)), b"cut", pickle.dumps(io.BytesIO(b"x"))):
        saved(weight=torch.zeros(2)).write_bytes(content)
        with pytest.raises(ValueError, match=r"optimizer_0/.metadata is missing or damaged"):
            check_pickles(theirs)
    assert not mark.exists()


def test_a_manifest_names_files_of_its_folder_alone(tmp_path):
    for name in ("../secret", "/dev/zero", "a/../../b"):
        files = json.dumps({"algorithm": "xxh3_128", "files": {name: [0, ""]}})
        (tmp_path / MANIFEST_FILE).write_text(files)
        assert f"{MANIFEST_FILE} is damaged" in damage(tmp_path)


def test_no_tag_of_yaml_is_constructed(tmp_path):
    mark, file = tmp_path / "mark", tmp_path / "theirs.yaml"
    file.write_text(f"seed: {yaml_payload(mark)}\n")
    card = tmp_path / "README.md"
    card.write_text(f"---\nlicense: {yaml_payload(mark)}\n---\n")
    for read in (
        lambda: read_config(file),
        lambda: parse_evaluation([str(file)]),
        lambda: with_installed_files(str(file), None, str(tmp_path)),
        lambda: update_evaluation(str(tmp_path), [{"dataset": "x", "top1": 0.5}]),
    ):
        with pytest.raises(ValueError, match="cannot be read: could not determine a constructor"):
            read()

    class Model:
        model, name = torch.nn.Identity(), str(tmp_path)

    assert model_source(Model()).license is None and not mark.exists()
