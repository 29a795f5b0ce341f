"""Students: any classifier or backbone of timm or transformers, tapped where the method wants its two maps."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from functools import cached_property, partial
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from transformers import PreTrainedModel

from .dry_run import dry_run
from .loading import Classifier, check_patches, load_classifier
from .maps import Tap, first_tensor
from .taps import find_taps


__all__ = ["POOLINGS", "Student", "load_student"]

POOLINGS = ("map", "model")

logger = logging.getLogger(__name__)

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Student(nn.Module):
    """A classifier or backbone that also returns its penultimate and last maps, from the same forward.

    Attributes:
        model: the network itself, what is saved and published.
        taps: the two `Tap`s, found at their first use; `dims` and `grids` are theirs.
        tap_remarks: sentences on what of them is not as the method, or the model's library, would have it.
        spec: the images it takes; labels: class names or None; num_labels: K, 0 of a backbone, which has no classifier.
        pooling: what its features are, the mean of the last "map" or the "model"'s own pooled output.
    """

    role = "student"
    last_blocks: int | None = None

    def __init__(self, classifier: Classifier, tap_names: tuple[str, str] | None = None):
        super().__init__()
        self.model: Any = classifier.module
        self.classifier = classifier
        self.name, self.spec = classifier.name, classifier.spec
        self.num_labels = classifier.num_labels
        self.labels = classifier.labels if self.num_labels else None
        self.tap_names = tap_names
        self.pretrained, self.pooling = False, "map"
        self.tap_remarks: list[str] = []
        self._tapped: dict[str, Any] = {}
        self._hooks: list[Any] = []
        self._recording = False
        if wanted := _other_input(self.model):
            raise ValueError(
                f"`student` {self.name!r} ({type(self.model).__name__}) takes {wanted}, not images as `pixel_values` (B, 3, height, "
                "width): no map of an image can be tapped in it, at any `image_size`. Take a student that takes images."
            )

    def checkpoint_activations(self, kwargs: dict[str, Any] | None = None) -> None:
        """Recompute activations in the backward pass, with the model's own means; `kwargs` as transformers takes them.

        Raises:
            ValueError: a model that has none.
        """
        try:
            if isinstance(self.model, PreTrainedModel):
                # By the former name before transformers 5.24.
                enable = getattr(self.model, "activation_checkpointing_enable", None)
                enable = enable or self.model.gradient_checkpointing_enable
                enable({"use_reentrant": False, **(kwargs or {})})
            else:
                self.model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"`activation_checkpointing` is on, but {self.name!r} cannot recompute its activations ({error}). Turn it off, "
                "or take a smaller batch with `gradient_accumulation_steps`."
            ) from error
        if any(isinstance(module, BATCHNORMS) for module in self.model.modules()):
            logger.warning(
                "With `activation_checkpointing`, BatchNorm takes each batch twice into its running statistics."
            )

    def name_labels(self, labels: list[str]) -> None:
        """Give the classes the names that the data set has for them, so that they are saved with the student.

        Raises:
            ValueError: another number of names than of classes.
        """
        if len(labels) != self.num_labels:
            raise ValueError(
                f"`labels` has {len(labels)} names, but the student {self.num_labels} classes. Give each its name."
            )
        self.labels = list(labels)
        if isinstance(self.model, PreTrainedModel):
            self.model.config.id2label = dict(enumerate(labels))
            self.model.config.label2id = {label: index for index, label in enumerate(labels)}

    @cached_property
    def taps(self) -> tuple[Tap, Tap]:
        check_patches(dataclasses.replace(self.classifier, spec=self.spec), "student")
        try:
            taps, self.tap_remarks = find_taps(self)
        except AttributeError as error:  # of which `Module` would make that there are no `taps`
            raise RuntimeError(f"`student` {self.name!r} could not be tapped: {error}.") from error
        for remark in self.tap_remarks:
            logger.warning(remark)
        self._hook(taps)
        return taps

    def _hook(self, taps: tuple[Tap, Tap]) -> None:
        """Record what the tapped modules put out."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for tap in taps:
            module = self.model.get_submodule(tap.module)
            # The children of a Sequential run alone when timm recomputes activations.
            while type(module) is nn.Sequential and len(module):
                module = module[-1]
            self._hooks.append(module.register_forward_hook(partial(self._record, tap.module)))

    def synchronise_batchnorms(self) -> None:
        """Have every BatchNorm take its statistics over all processes: another module takes the place of each."""
        convert_sync_batchnorm(self.model)  # timm's: it keeps activations that sit in its norms
        self.tap_again()

    def tap_again(self) -> None:
        """Tap the modules that stand where others did: in a converted model, or in another that took its place."""
        if "taps" in vars(self):
            self._hook(self.taps)

    @property
    def dims(self) -> tuple[int, int]:
        """Channels (C_p, C_l) of the two maps."""
        return self.taps[0].dim, self.taps[1].dim

    @property
    def grids(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Grids ((h, w), (h, w)) of the two maps."""
        return self.taps[0].grid, self.taps[1].grid

    def classify(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, height, width) to logits (B, K); of a backbone to its own pooled output (B, C)."""
        output = self.model(pixel_values.to(self._dtype()))
        if not isinstance(self.model, PreTrainedModel):
            return first_tensor(output)
        if "logits" in output:
            return output.logits
        if self.num_labels:
            raise TypeError(
                f"a {type(self.model).__name__} puts out {', '.join(output)}, but no `logits`, which this package and the "
                "pipelines of transformers read. Take another student, or such a network from timm."
            )
        pooled = output.get("pooler_output")
        if pooled is None:
            hidden = output.last_hidden_state
            pooled = hidden.mean((2, 3)) if hidden.ndim == 4 else hidden.mean(1)
        return pooled.flatten(1)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, height, width) to features (B, C_l) in float32: the mean of the last map over its places.

        With `pooling` "model" what `classify` gives of a backbone, such as the class token of a ViT.
        """
        if self.pooling == "model":
            return self.classify(pixel_values).float()
        return self(pixel_values)[1].float().mean((2, 3))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, height, width) to the penultimate map, the last map (B, C, h, w each) and logits (B, K).

        Of a backbone the third is its features (B, C_l), see `features`.
        """
        taps = self.taps
        self._recording = True
        try:
            logits = self.classify(pixel_values)
        finally:
            self._recording = False
        tapped, self._tapped = self._tapped, {}
        if missing := [tap.module for tap in taps if tap.module not in tapped]:
            raise RuntimeError(
                f"`student` {self.name!r} gave no map at {', '.join(missing)}: that part was skipped, or another module has "
                "taken its place since the student was tapped. Change the model before it is given to `load_student`."
            )
        penultimate, last = (tap.as_map(tapped[tap.module]) for tap in taps)
        return penultimate, last, logits if self.num_labels else last.float().mean((2, 3))

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def freeze_unused(self) -> list[str]:
        """Freeze parameters that the logits do not depend on, such as mask tokens: DDP waits for their gradients.

        Of a backbone, those that its last map does not depend on, such as a pooler's.

        Returns:
            Their names.
        """
        names, parameters = zip(*[(n, p) for n, p in self.model.named_parameters() if p.requires_grad], strict=True)
        output = dry_run(self)[1] if self.num_labels else self._last_map_of_a_dry_run()
        gradients = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
        unused = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
        for name in unused:
            self.model.get_parameter(name).requires_grad_(False)
        return unused

    def _last_map_of_a_dry_run(self) -> Tensor:
        last = self.taps[1]
        self._recording = True
        try:
            dry_run(self)
        finally:
            self._recording = False
        tapped, self._tapped = self._tapped, {}
        return last.as_map(tapped[last.module])

    def _record(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if self._recording:
            self._tapped[name] = output


def load_student(
    name_or_module: str | nn.Module,
    *,
    pretrained: bool = False,
    taps: tuple[str, str] | list[str] | None = None,
    **kwargs: Any,
) -> Student:
    """A student from a name or module.

    Args:
        name_or_module: see `load_classifier`. With `num_classes=0`, or a module without a classifier, the student is a
            backbone, which learns from the teacher's features alone.
        pretrained: start from its published weights. The paper trains students from scratch.
        taps: names of the two modules to tap, where others are wanted than those that the dry run finds.
        **kwargs: `labels` (names of the classes of a new head, or of a module's), `image_size`, `mean`, `std`, `crop_pct`, and
            arguments of the model itself, see `load_classifier`.
    """
    if isinstance(name_or_module, Student):
        if kwargs.get("labels") is not None:
            raise ValueError(
                "`labels` are given for a `Student`, which is loaded already. Use its `name_labels(labels)`."
            )
        return name_or_module
    classifier = load_classifier(name_or_module, role="student", pretrained=pretrained, **kwargs)
    student = Student(classifier, tuple(taps) if taps is not None else None)  # type: ignore[arg-type]
    student.pretrained = pretrained and isinstance(name_or_module, str)
    if kwargs.get("labels") is not None and isinstance(name_or_module, nn.Module):
        student.name_labels(kwargs["labels"])  # in its configuration, too
    return student


def _other_input(model: Any) -> str | None:
    """What a model of transformers takes instead of images, or beside their patches."""
    if not isinstance(model, PreTrainedModel):
        return None
    if model.main_input_name != "pixel_values":
        return f"`{model.main_input_name}`"
    shapes = "spatial_shapes"  # of images that are cut into patches before
    return f"cut patches with their `{shapes}`" if shapes in inspect.signature(model.forward).parameters else None
