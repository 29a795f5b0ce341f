"""For the site: arguments in transformers' style, whose types and defaults the signature has as well, in Google's."""

import re
from typing import Any

import griffe


class TransformersStyle(griffe.Extension):
    """Turns "name (`int`, *optional*, defaults to `1`):" into "name:"."""

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        if cls.docstring is not None:
            cls.docstring.value = re.sub(r"(?m)^( +\w+) \(`[^`]+`.*\):$", r"\1:", cls.docstring.value)
