"""The texts below the fields of a dataclass, which are its settings' documentation."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields
from itertools import pairwise


def field_docstrings(settings: type) -> dict[str, str]:
    """The string below each field of a dataclass, in one line; empty where there is none."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    texts = dict.fromkeys((field.name for field in fields(settings)), "")
    for one, below in pairwise(getattr(definition, "body", [])):
        match one, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = " ".join(text.split())
    return texts
