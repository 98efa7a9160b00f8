"""The package's public names, and what their docstrings say of what they take."""

import inspect
import re
from collections.abc import Callable, Iterator

import lightning_gradnorm

SECTION = re.compile(r"^(Args|Attributes|Raises|Returns):$", re.MULTILINE)


def described(docstring: str, section: str) -> list[str]:
    """The names that a section of a Google-style docstring describes, in its order."""
    parts = SECTION.split(docstring)
    text = parts[parts.index(section) + 1] if section in parts else ""
    return [
        name for names in re.findall(r"^ {4}(\*{0,2}\w+(?:, \w+)*):", text, flags=re.MULTILINE) for name in names.split(", ")
    ]


def parameters(taker: Callable[..., object]) -> list[str]:
    """What it takes, but for ``self``."""
    return [name for name in inspect.signature(taker).parameters if name != "self"]


def own_classes(exported: type) -> Iterator[type]:
    """The class, and those bases of the package that are not exported by themselves; not a Trainer's hooks."""
    for base in exported.__mro__:
        is_ours = (
            re.match(r"lightning_gradnorm\.(?!callbacks)", base.__module__) and base.__name__ not in lightning_gradnorm.__all__
        )
        if base is exported or is_ours:
            yield base


def public() -> Iterator[tuple[str, object]]:
    """``(dotted name, object)`` of what is exported, and of the methods and properties of what is a class."""
    for name in lightning_gradnorm.__all__:
        exported = getattr(lightning_gradnorm, name)
        yield name, exported
        for owner in own_classes(exported) if inspect.isclass(exported) else ():
            fields = getattr(exported, "__dataclass_fields__", {})
            for attribute, value in vars(owner).items():
                is_member = inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod)
                if not attribute.startswith("_") and is_member and attribute not in fields:
                    yield f"{name}.{attribute}", getattr(exported, attribute)
