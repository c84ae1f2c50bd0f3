"""Captions and classes: read from side files and columns."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from diffnext.data.caching.errors import BadExample
from diffnext.data.caching.items import Item
from diffnext.data.caching.media import encoding_of
from diffnext.data.caching.settings import CacheSettings
from diffnext.data.flex_transforms import first_sentence

BYTES_PER_CHARACTER = 4
MAX_JSON_BYTES = 1 << 20  # files of metadata hold more than captions
LABEL = TypeAdapter(Annotated[int, Field(ge=0, lt=2**63)])
FLOW = TypeAdapter(Annotated[float, Field(ge=0, allow_inf_nan=False)])
VALUE_NAMES = ("caption", "text", "label", "flow")
NO_CAPTION = "no caption: put a .txt or .json file beside it, or name a --caption-column"
SIDES = re.compile(r"\b(left|right)(most|wards?|[- ]hand(ed)?)?\b", re.IGNORECASE)

T = TypeVar("T")


@dataclass(frozen=True)
class Annotation:
    """The captions, class and motion strength of an example.

    Attributes:
        caption: Long caption; empty if there is none.
        text: Short caption; empty if there is none.
        label: Class, or None.
        flow: Motion strength, or None.
    """

    caption: str = ""
    text: str = ""
    label: int | None = None
    flow: float | None = None

    @property
    def names_a_side(self) -> bool:
        """Whether the captions would be wrong for a mirrored picture."""
        return bool(SIDES.search(self.caption) or SIDES.search(self.text))

    @property
    def short_caption(self) -> str:
        """The short caption that training chooses; empty if it is the long one."""
        short = self.text or first_sentence(self.caption)
        return "" if short == self.caption else short


def read_annotation(item: Item, settings: CacheSettings) -> Annotation:
    """Captions, class and flow of an item.

    Columns come before ``.json``, and ``.json`` before ``.txt`` and ``.cls``. Without a long
    caption, the short one is the caption.

    Raises:
        BadExample: If something needed is missing or of another type.
    """
    values = dict(_side_values(item, settings))
    values.update((name, value) for name, value in item.values.items() if not is_missing(value))
    if is_missing(values.get("caption")) and "text" in values:
        values["caption"] = values.pop("text")
    label = values.get("label") if settings.labels else None
    annotation = Annotation(
        caption=clean_text("caption", values.get("caption"), settings.max_caption),
        text=clean_text("text", values.get("text"), settings.max_caption),
        label=_parse_number("label", LABEL, "a whole number", label),
        flow=_parse_number("flow", FLOW, "a number of at least 0", values.get("flow")),
    )
    if settings.labels and annotation.label is None:
        raise BadExample("no label")
    if not (annotation.caption or settings.labels or settings.empty_captions):
        raise BadExample("the caption is empty" if "caption" in values else NO_CAPTION)
    return annotation


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, no text, or not a number."""
    return value is None or value == "" or value != value


def _side_values(item: Item, settings: CacheSettings) -> Mapping[str, Any]:
    values: dict[str, Any] = {}
    limit = BYTES_PER_CHARACTER * settings.max_caption
    if ".txt" in item.sides:
        values["caption"] = _read_text(item, ".txt", limit)
    if ".cls" in item.sides:
        values["label"] = _read_text(item, ".cls", limit)
    if ".json" in item.sides:
        values.update(_read_json(item, limit + MAX_JSON_BYTES, settings))
    return values


def _read_text(item: Item, suffix: str, limit: int) -> str:
    try:
        content = item.sides[suffix].read(limit)
        return content.decode(encoding_of(content))
    except UnicodeDecodeError as error:
        raise BadExample(f"its {suffix} file is not UTF-8") from error
    except BadExample as error:
        raise BadExample(f"its {suffix} file: {error}") from error


def _read_json(item: Item, limit: int, settings: CacheSettings) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(item, ".json", limit))
    except (ValueError, RecursionError) as error:
        raise BadExample(f"its .json file is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadExample("its .json file holds no JSON object")
    names = {name: getattr(settings.columns, name) or name for name in VALUE_NAMES}
    return {name: content[key] for name, key in names.items() if not is_missing(content.get(key))}


def clean_text(name: str, value: Any, limit: int) -> str:
    """A caption without blanks around it.

    Raises:
        BadExample: If it is not text, too long, or not UTF-8.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str):
        raise BadExample(f"the {name} must be text, got {type(value).__name__}")
    value = value.strip()
    if len(value) > limit:
        raise BadExample(f"the {name} has {len(value)} characters, more than {limit}")
    if "\0" in value:
        raise BadExample(f"the {name} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadExample(f"the {name} is not UTF-8") from error
    return value


def _parse_number(name: str, kind: TypeAdapter[T], rule: str, value: Any) -> T | None:
    if value is None:
        return None
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        raise BadExample(f"the {name} must be {rule}, got {value!r:.80}") from error
