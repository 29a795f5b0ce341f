"""Students as backbones of segmentation and detection. Importing it makes `from_pretrained` of transformers know their classes."""

from __future__ import annotations

from . import mask_rcnn, student_backbone  # noqa: F401  register their configurations
