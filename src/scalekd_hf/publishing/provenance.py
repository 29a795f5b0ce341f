"""Where models and data come from, as far as that is known: identifiers, revisions and licenses for the card."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from huggingface_hub import HfApi, metadata_load, try_to_load_from_cache

from ..borrowed.datasets import files_of
from ..borrowed.transformers import commit_of


__all__ = ["Source", "citations", "data_source", "hardware", "model_source", "versions"]

PACKAGES = ("scalekd-hf", "torch", "transformers", "timm", "datasets", "accelerate")
HUB_FILE = re.compile(r"hf://datasets/([^/@]+/[^/@]+|[^/@]+)@([0-9a-f]{40})")
PERMISSIVE = re.compile(r"^(apache-2\.0|mit|isc|bsd(-.*)?|cc0.*|cc-by(-\d\.\d)?|unlicense|wtfpl|unknown)$")
PAPERS = {  # by the beginning of an architecture's name; the longest that fits
    "swin": "liu2021swin",
    "swinv2": "liu2022swinv2",
    "vit": "dosovitskiy2021vit",
    "deit": "touvron2021deit",
    "beit": "bao2022beit",
    "eva": "fang2023eva",
    "eva02": "fang2023eva02",
    "dinov2": "oquab2023dinov2",
    "dinov3": "simeoni2025dinov3",
    "clip": "radford2021clip",
    "siglip": "zhai2023siglip",
    "convnext": "liu2022convnext",
    "resnet": "he2016resnet",
}


@dataclass(frozen=True)
class Source:
    """A model or data set: a name to print, and what is known of its origin.

    Attributes:
        name: never a path of the machine that trained.
        hub_id, revision: on the Hub, where it comes from there; the revision is a commit.
        license: as its author names it.
        architecture: of a model.
        is_local: a folder, files or a module of whoever trained, which no reader can load.
        split, config: of a data set, where they are known.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    license: str | None = None
    architecture: str = ""
    is_local: bool = False
    split: str | None = None
    config: str | None = None

    @property
    def restriction(self) -> str | None:
        """A warning about a license that may restrict what is derived."""
        if not self.license or PERMISSIVE.search(self.license.lower()):
            return None
        return (
            f"The license of {self.name} is `{self.license}`, which may restrict the use of what is derived from it, "
            "and a distilled student may count as that. Read it before you use or share this model."
        )


def model_source(model: Any) -> Source:
    """The origin of a `Teacher` or `Student`, from its name, its configuration, and the Hub where that answers."""
    module, name = model.model, model.name.removeprefix("local-dir:")
    config = getattr(module, "pretrained_cfg", None) or {}
    architecture = config.get("architecture") or type(module).__name__
    if Path(name).is_dir():
        license = _card_license(Path(name, "README.md"))
        return Source(Path(name).resolve().name, None, None, license, architecture, is_local=True)
    if name.startswith("timm/"):
        hub_id = config.get("hf_hub_id")
        return Source(name, hub_id, _cached_revision(hub_id), config.get("license"), architecture)
    hub_id = name.removeprefix("hf-hub:").split("@")[0]
    if "/" not in hub_id:
        return Source(name, architecture=architecture, is_local=True)  # a module of the user's
    revision = commit_of(module) or _cached_revision(hub_id)
    return Source(hub_id, hub_id, revision, config.get("license") or _hub_license(hub_id), architecture)


def data_source(dataset: Any) -> Source | None:
    """The data set on the Hub that rows come from, with its commit; None where they come from elsewhere."""
    info = getattr(dataset, "info", None)
    places = [*(getattr(info, "download_checksums", None) or ())]
    if isinstance(dataset, datasets.IterableDataset):
        places += [str(value) for value in files_of(dataset).values()]
    for place in places:
        if found := HUB_FILE.search(place):
            return Source(
                found[1], found[1], found[2], getattr(info, "license", None) or None, split=_whole_split(dataset)
            )
    return None


def _whole_split(dataset: Any) -> str | None:
    """The split that a data set on the disk is, where it is all of it; what is left of one keeps its name."""
    split = str(getattr(dataset, "split", None))
    counted = (getattr(getattr(dataset, "info", None), "splits", None) or {}).get(split)
    whole = counted is not None and isinstance(dataset, datasets.Dataset) and len(dataset) == counted.num_examples
    return split if whole else None


def citations(architecture: str | None) -> str:
    """BibTeX of the method, and of the teacher's architecture where it is known."""
    text = (files("scalekd_hf.publishing") / "templates" / "citations.bib").read_text(encoding="utf-8")
    entries = {entry.split("{", 1)[1].split(",", 1)[0]: entry.strip() for entry in text.split("\n\n")}
    wanted = ["fan2024scalekd"]
    lowered = (architecture or "").lower()
    found = [start for start in PAPERS if lowered.startswith(start) or f"_{start}" in lowered]
    if found:
        wanted.append(PAPERS[max(found, key=len)])
    return "\n\n".join(entries[key] for key in wanted)


def versions() -> dict[str, str]:
    """Of this package and of those that decide what it computes."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware(processes: int, device: torch.device) -> str:
    """What a run runs on."""
    if device.type == "cuda":
        return f"{processes} × {torch.cuda.get_device_name(device)}"
    return f"{processes} {device.type.upper()} process{'es' if processes > 1 else ''}"


def _cached_revision(hub_id: str | None) -> str | None:
    for name in ("model.safetensors", "config.json", "pytorch_model.bin"):
        found = try_to_load_from_cache(hub_id, name) if hub_id else None
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def _card_license(file: Path) -> str | None:
    try:
        license: str | None = (metadata_load(file) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return license


def _hub_license(hub_id: str) -> str | None:
    try:
        data = HfApi().model_info(hub_id, timeout=10).card_data
        return data.license if data is not None else None
    except Exception:  # offline, gated or gone: then it is not known
        return None
