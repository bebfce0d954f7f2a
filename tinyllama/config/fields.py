"""Field docstrings of dataclasses, and copies of dataclasses in which every field is optional."""

import ast
import dataclasses
import functools
import inspect
import itertools
import typing


def all_optional(cls: type) -> type:
    """Derive a dataclass with the fields of ``cls``, each of which may be None and is by default."""
    kinds = typing.get_type_hints(cls, include_extras=True)
    optional = [
        (field.name, kinds[field.name] | None, dataclasses.field(default=None, metadata={"doc": field_doc(cls, field)}))
        for field in dataclasses.fields(cls)
    ]
    return dataclasses.make_dataclass(f"Optional{cls.__name__}", optional, frozen=True)


def field_doc(cls: type, field: dataclasses.Field) -> str:
    """Return the string under ``field`` of ``cls``, on one line."""
    return field.metadata.get("doc") or _docs(cls).get(field.name, "")


@functools.cache
def _docs(cls: type) -> dict[str, str]:
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        ast.unparse(node.target): " ".join(ast.literal_eval(after.value).split())
        for node, after in itertools.pairwise(definition.body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)
    }
