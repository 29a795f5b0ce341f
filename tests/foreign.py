"""Files as a stranger could make them: what is in them would leave a mark if it were executed."""

import os
import pickle


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def works(mark):
    """Whether a payload does what it should, where it is unpickled without care; takes its mark away."""
    pickle.loads(pickle.dumps(Payload(mark)))
    made = mark.is_dir()
    mark.rmdir()
    return made


def yaml_payload(mark):
    """A YAML value that makes the same file where any tag is constructed."""
    return f"!!python/object/apply:os.mkdir ['{mark}']"
