"""Checkpoints of others are read without running anything of them, whatever they hold."""

import argparse
import enum
import os
import pickle
import struct
import subprocess
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from scalekd_hf.models.foreign_pickle import read_foreign


class Runs:
    """Runs a command when it is loaded."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


class Config(dict):
    pass


class History:
    """As mmengine keeps what it logs."""

    def __init__(self):
        self.values, self.methods = np.arange(3.0), {"mean": "mean"}


class Level(enum.Enum):
    HIGH = 1


def weights():
    transposed = torch.arange(6.0).view(2, 3).T
    return {"w": transposed, "p": nn.Parameter(torch.ones(2)), "half": torch.ones(2, dtype=torch.bfloat16)}


def objects():
    return {
        "meta": Config(cfg="model = dict()", nested=Config(depth=[1, 2])),
        "message_hub": {"log": [History(), np.float64(3.0)], "levels": {Level.HIGH: 1}, "seen": {1, 2}},
        "args": argparse.Namespace(lr=0.1),
    }


def with_byte_order(order):
    def made(file):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x02N.")
            archive.writestr("a/version", "3\n")
            archive.writestr("a/byteorder", order)

    return made


def cut_record(file):
    """Change a byte of the directory at the end of a zip file."""
    content = bytearray(file.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 46] = 0xFF
    file.write_bytes(bytes(content))


FORMATS = [(new, protocol) for new in (True, False) for protocol in (2, 4)]


@pytest.mark.parametrize(("new", "protocol"), FORMATS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_tensors_and_containers_are_read_beside_objects_that_are_not_made(new, protocol, tmp_path):
    file = tmp_path / "epoch_300.pth"
    torch.save(
        {"state_dict": weights(), **objects()}, file, _use_new_zipfile_serialization=new, pickle_protocol=protocol
    )
    content, passed_over = read_foreign(file)
    assert all(torch.equal(content["state_dict"][name], value) for name, value in weights().items())
    assert content["meta"] == {"cfg": "model = dict()", "nested": {"depth": [1, 2]}}
    assert {"argparse.Namespace", f"{__name__}.History", "numpy.ndarray"} <= set(passed_over)
    assert not isinstance(content["args"], argparse.Namespace)
    torch.save(weights(), file, _use_new_zipfile_serialization=new)
    assert read_foreign(file)[1] == []


@pytest.mark.parametrize(("new", "protocol"), FORMATS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_malicious_file_runs_nothing(new, protocol, tmp_path):
    marker = tmp_path / "was_run"
    evil = [
        Runs(os.system, f"touch {marker}"),
        Runs(subprocess.Popen, ["touch", str(marker)]),
        Runs(exec, f"open({str(marker)!r}, 'w')"),
        Runs(eval, f"open({str(marker)!r}, 'w')"),
        Runs(getattr, torch.Tensor, "numpy"),
    ]
    file = tmp_path / "evil.pth"
    torch.save(
        {"state_dict": weights(), "evil": evil},
        file,
        _use_new_zipfile_serialization=new,
        pickle_protocol=protocol,
    )
    content, passed_over = read_foreign(file)
    assert all(torch.equal(content["state_dict"][name], value) for name, value in weights().items())
    assert not marker.exists() and any("system" in name for name in passed_over)
    with file.open("rb") as opened, pytest.raises(pickle.UnpicklingError):  # so that the file could have run something
        torch.load(opened, weights_only=True)
    torch.load(file, weights_only=False)
    assert marker.exists()


def test_a_file_changes_nothing_of_torch(tmp_path):
    target = torch._utils._rebuild_tensor_v2
    file = tmp_path / "sets.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x07changedK\x01s\x86b.")
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")
    with pytest.raises(ValueError, match="cannot be read"):
        read_foreign(file)
    assert not hasattr(target, "changed")
    torch.load(file, weights_only=False)  # so that the file could have
    assert target.changed
    del target.changed


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda file: None, "is no file"),
        (lambda file: file.write_bytes(b"not a checkpoint"), "cannot be read"),
        (lambda file: file.write_bytes(b""), "cannot be read"),
        (lambda file: torch.jit.script(nn.Linear(2, 2)).save(str(file)), "TorchScript program"),
        (lambda file: (torch.save(weights(), file), file.write_bytes(file.read_bytes()[:-200])), "cannot be read"),
        (lambda file: file.write_bytes(pickle.dumps([1, 2])), "cannot be read"),
        (lambda file: file.write_bytes(b"PK\x03\x04" + bytes(20) + b"PK\x05\x06" + b"\xff" * 18), "cannot be read"),
        (with_byte_order("middle"), "cannot be read"),
        (lambda file: torch.save(10**5 * "x", file, pickle_protocol=4) or cut_record(file), "cannot be read"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:Detected pickle protocol")
def test_what_is_missing_damaged_or_a_program_is_refused_by_name(made, said, tmp_path):
    file = tmp_path / "x.pth"
    made(file)
    with pytest.raises(ValueError, match=said) as error:
        read_foreign(file)
    assert "x.pth" in str(error.value)


@pytest.mark.parametrize("error", [KeyError("storage"), IndexError(), struct.error("unpack"), RecursionError()])
def test_whatever_reading_leads_to_is_told_as_a_damaged_file(error, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise error

    torch.save(weights(), tmp_path / "x.pth")
    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(ValueError, match=r"x\.pth' cannot be read: \S+") as told:
        read_foreign(tmp_path / "x.pth")
    assert (str(error) or type(error).__name__) in str(told.value)


def test_safetensors_are_read(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    content, passed_over = read_foreign(tmp_path / "x.safetensors")
    assert torch.equal(content["w"], torch.ones(2)) and passed_over == []
    (tmp_path / "x.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        read_foreign(tmp_path / "x.safetensors")
