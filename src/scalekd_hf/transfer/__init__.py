"""Students as backbones of segmentation and detection. Importing it makes `from_pretrained` of transformers know their classes."""

from __future__ import annotations

from . import student_backbone  # noqa: F401  registers its configuration
