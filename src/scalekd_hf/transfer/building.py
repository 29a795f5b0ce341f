"""The segmenter or the detector that settings describe."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torchvision.models.detection import FasterRCNN, MaskRCNN
from transformers import DFineConfig

from ..models.students import load_student
from ..tools.recipe import mapping
from ..tools.words import check_known
from .config import TransferArguments, TransferConfig
from .detector import build_detector
from .segmenter import build_segmenter


MODULES = ("pool", "head", "predictor")  # end the names of arguments that are no numbers
OF_BACKBONE = {"backbone_config", "encoder_in_channels", "feat_strides", "decoder_in_channels", "id2label", "label2id"}

__all__ = ["build_model", "checked_head_args"]


def checked_head_args(head: str, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a head, as they are given.

    Raises:
        ValueError: one that the head does not know, which its library would take without a word, or a size that is none.
    """
    known = {"hidden_size"}
    if head == "mask_rcnn":
        of_detector = {*signature(FasterRCNN.__init__).parameters, *signature(MaskRCNN.__init__).parameters}
        known |= {
            name for name in of_detector if name.startswith(("rpn_", "box_")) and name.split("_")[-1] not in MODULES
        }
    elif head == "d_fine":
        known |= set(DFineConfig().to_dict()) - OF_BACKBONE
    for name, value in given.items():
        check_known(name, known, f"`{name}` of `head_args`")
        if name == "hidden_size" and (not isinstance(value, int) or value < 2):
            raise ValueError(f"`hidden_size` of `head_args` must be a whole number of at least 2, got {value!r}.")
    return given


def build_model(task: str, arguments: TransferArguments, config: TransferConfig, class_names: list[str]) -> Any:
    """A student with a head on it.

    Args:
        task: "segment" or "detect".
        arguments, config: the settings.
        class_names: of the data.

    Raises:
        ValueError: see `build_segmenter` and `build_detector`.
    """
    head = arguments.head_of(task)
    options = {
        "image_size": config.image_size,
        "drop_path_rate": arguments.drop_path_rate,
        "pretrained": arguments.backbone_pretrained,
        **checked_head_args(head, mapping(arguments.head_args, "head_args")),
    }
    student: Any = arguments.student
    if given := mapping(arguments.student_args, "student_args"):
        student = load_student(student, pretrained=arguments.backbone_pretrained, **given)
    if task == "segment":
        return build_segmenter(student, class_names, **options)
    return build_detector(student, class_names, head=head, **options)
