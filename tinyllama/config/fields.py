"""Field docstrings of dataclasses, and copies of dataclasses in which every field is optional."""

import ast
import dataclasses
import functools
import inspect
import itertools
import typing

_DOCUMENTED_IN = "documented_in"


def all_optional(cls: type) -> type:
    """Derive a dataclass with the fields of ``cls``, each of which may be None and is by default."""
    kinds = typing.get_type_hints(cls, include_extras=True)
    optional = [
        (field.name, kinds[field.name] | None, dataclasses.field(default=None, metadata={_DOCUMENTED_IN: cls}))
        for field in dataclasses.fields(cls)
    ]
    return dataclasses.make_dataclass(f"Optional{cls.__name__}", optional, frozen=True)


def field_doc(cls: type, field: dataclasses.Field) -> str:
    """Return the string under ``field`` of ``cls``, on one line."""
    return _docs(field.metadata.get(_DOCUMENTED_IN, cls))[field.name]


@functools.cache
def _docs(cls: type) -> dict[str, str]:
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for node, after in itertools.pairwise(definition.body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            docs[node.target.id] = " ".join(str(text).split())
    return docs
