"""Which columns of a parquet file hold the images and the labels."""

import json

import pyarrow as pa

from modeling.data.card import Card
from modeling.data.tables import LABEL_COLUMNS
from modeling.errors import UserError


def _features(schema: pa.Schema) -> dict[str, dict]:
    """Give what the library `datasets` wrote about the columns; nothing if it did not write the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {column: kind for column, kind in features.items() if isinstance(kind, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Give the class names that the file has for a column, or None."""
    feature = _features(schema).get(column, {})
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    return [str(name) for name in names] if isinstance(names, list) else None


def _choose(candidates: list[str], schema: pa.Schema, chosen: str | None, what: str, name: str) -> str:
    flag = f"--{what}-column"
    types = ", ".join(f"{column} ({schema.field(column).type})" for column in schema.names)
    if chosen is not None:
        if chosen in schema.names:
            return chosen
        raise UserError(f"{name} has no column {chosen!r} ({flag}), only {types}")
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise UserError(
            f"{name} has {len(candidates)} columns that may be the {what}, {', '.join(candidates)}: "
            f"choose one with {flag}"
        )
    raise UserError(f"{name} has no {what} column that can be told by its type, only {types}: use {flag}")


def image_columns(schema: pa.Schema) -> list[str]:
    """Give the columns of type Image, or if there are none, those that hold bytes."""
    features = _features(schema)
    columns = [column for column in schema.names if features.get(column, {}).get("_type") == "Image"]
    return columns or [field.name for field in schema if _holds_bytes(field.type)]


def choose_image_column(schema: pa.Schema, chosen: str | None, name: str) -> str:
    """Give the column of images. UserError: there is none, or several and none was chosen."""
    column = _choose(image_columns(schema), schema, chosen, "image", name)
    if not _holds_bytes(schema.field(column).type):
        raise UserError(
            f"the column {column!r} of {name} holds {schema.field(column).type}, not the bytes of images"
        )
    return column


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {field.name for field in kind} >= {"bytes", "path"}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def choose_label_column(
    schema: pa.Schema, chosen: str | None, name: str, card: Card, config: str | None
) -> str:
    """Give the column of labels. UserError: there is none, or several and none was chosen."""
    candidates = [
        column for column in schema.names if class_names(schema, column) or card.names_of(config, column)
    ]
    plain = [field.name for field in schema if is_plain_label(field.type)]
    candidates = candidates or [column for column in plain if column in LABEL_COLUMNS] or plain
    return _choose(candidates, schema, chosen, "label", name)


def is_plain_label(kind: pa.DataType) -> bool:
    return (
        pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_dictionary(kind)
    )
