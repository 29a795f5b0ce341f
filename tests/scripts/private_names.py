"""List what this package uses of other libraries although it is not public there.

    python tests/scripts/private_names.py [FOLDER]

Counted are modules, names and folders that begin with an underscore; attributes that do, where this package does not
define them; members of a library's class that do and are overridden or used by a class derived from it; those that
`Trainer` reads of its model; and what `datasets` has in modules that it does not document.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path


LIBRARIES = ("accelerate", "datasets", "huggingface_hub", "timm", "torch", "transformers")
DOCUMENTED = {"datasets": ("datasets", "datasets.config", "datasets.exceptions", "datasets.fingerprint")}
PUBLIC = {"_replace"}  # of named tuples


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in PUBLIC


def imported(tree: ast.Module) -> Iterator[str]:
    """What is imported of a library that is not public there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            library = node.module.split(".")[0]
            hidden = any(map(is_private, node.module.split(".")))
            hidden |= library in DOCUMENTED and node.module not in DOCUMENTED[library]
            if library in LIBRARIES:
                yield from (f"{node.module}.{a.name}" for a in node.names if hidden or is_private(a.name))
        elif isinstance(node, ast.BinOp) and isinstance(node.left, ast.Call) and isinstance(node.right, ast.Constant):
            if getattr(node.left.func, "id", "") == "files" and is_private(str(node.right.value)):
                yield f"{ast.literal_eval(node.left.args[0])}/{node.right.value}"


def attributes(tree: ast.AST) -> Iterator[str]:
    """Attributes that are read, set, or named in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            yield from (word.value for word in node.args[1:2] if isinstance(word, ast.Constant))


def defined(tree: ast.Module) -> Iterator[str]:
    """What this package names itself: functions, classes, fields, and what it sets on `self`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        yield part.id
                    elif (
                        isinstance(part, ast.Attribute)
                        and isinstance(part.value, ast.Name)
                        and part.value.id == "self"
                    ):
                        yield part.attr


def of_parents(package: str) -> dict[str, set[str]]:
    """Private members of a library's class that a class derived from it overrides or uses, by module."""
    found: dict[str, set[str]] = {}
    for info in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        module = importlib.import_module(info.name)
        for cls in [cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == info.name]:
            tree = ast.parse(inspect.getsource(cls))
            used = set(filter(is_private, (*attributes(tree), *defined(tree))))
            for base in cls.__mro__[1:]:
                if base.__module__.split(".")[0] not in LIBRARIES:
                    continue
                source = inspect.getsource(base)
                names = {*vars(base), *re.findall(r"self\.(_\w+)", source)}
                found.setdefault(info.name, set()).update(f"{base.__name__}.{name}" for name in used & names)
    return found


def borrowed(folder: Path) -> dict[str, set[str]]:
    """What each file of a package borrows."""
    trees = {file: ast.parse(file.read_text()) for file in sorted(folder.rglob("*.py"))}
    own = {name for tree in trees.values() for name in defined(tree)}
    of_models = set(re.findall(r"\bmodel\.(_\w+)", inspect.getsource(importlib.import_module("transformers.trainer"))))
    parents, found = of_parents(folder.name), {}
    for file, tree in trees.items():
        module = ".".join(file.relative_to(folder.parent).with_suffix("").parts)
        of_others = {name for name in attributes(tree) if is_private(name) and name not in own}
        names = {*imported(tree), *of_others, *parents.get(module, ()), *(of_models & set(defined(tree)))}
        names -= {name for name in of_others if any(parent.endswith(f".{name}") for parent in parents.get(module, ()))}
        if names:
            found[str(file.relative_to(folder))] = names
    return found


if __name__ == "__main__":
    found = borrowed(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[2] / "src" / "scalekd_hf")
    for file, names in found.items():
        print(f"{file}: {', '.join(sorted(names))}")
    print(f"{len(set().union(*found.values()))} names in {len(found)} files")
