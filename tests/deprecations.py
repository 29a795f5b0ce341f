"""What libraries say in their logs is to go; what they warn of is held by `filterwarnings` in pyproject.toml."""

import logging
import re


LIBRARIES = ("accelerate", "datasets", "evaluate", "huggingface_hub", "timm", "torch", "torchvision", "transformers")
GOES = re.compile(r"deprecat|will be removed", re.IGNORECASE)


class Heard(logging.Handler):
    """Keeps such lines, to fail the test that they were said in: a setting of ours, or a call, has another name now."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []
        for library in LIBRARIES:
            logging.getLogger(library).addHandler(self)

    def emit(self, record):
        if GOES.search(record.getMessage()):
            self.lines.append(f"{record.name}: {record.getMessage()}")

    def check(self):
        lines, self.lines = self.lines, []
        assert not lines, f"a library says that what was done here is to go: {lines}"


HEARD = Heard()
