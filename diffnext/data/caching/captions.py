"""Captions and classes: from side files and columns to what a record holds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffnext.data.caching.errors import BadExample
from diffnext.data.caching.items import Item
from diffnext.data.caching.media import encoding_of
from diffnext.data.caching.settings import CacheSettings
from diffnext.data.flex_transforms import first_sentence

BYTES_PER_CHARACTER = 4
MAX_JSON_BYTES = 1 << 20  # beside the captions, files of metadata hold other values
SIDES = re.compile(r"\b(left|right)(most|wards?|[- ]hand(ed)?)?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Annotation:
    """What is said about an example.

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
        """Whether a mirrored picture would belie the captions."""
        return bool(SIDES.search(self.caption) or SIDES.search(self.text))

    @property
    def short_caption(self) -> str:
        """What training takes for the short caption, empty where it is the long one."""
        short = self.text or first_sentence(self.caption)
        return "" if short == self.caption else short


def read_annotation(item: Item, settings: CacheSettings) -> Annotation:
    """Captions, class and flow of an item.

    Columns count before ``.json``, that before ``.txt`` and ``.cls``. An only text is the caption.

    Raises:
        BadExample: If something needed is missing or of another type.
    """
    values = dict(_side_values(item, settings))
    values.update((name, value) for name, value in item.values.items() if not is_missing(value))
    if is_missing(values.get("caption")) and "text" in values:
        values["caption"] = values.pop("text")
    annotation = Annotation(
        caption=clean_text("caption", values.get("caption"), settings.max_caption),
        text=clean_text("text", values.get("text"), settings.max_caption),
        label=_whole_number(values.get("label")) if settings.labels else None,
        flow=_number(values.get("flow")),
    )
    if settings.labels and annotation.label is None:
        raise BadExample("no label")
    if not (annotation.caption or settings.labels or settings.empty_captions):
        raise BadExample("the caption is empty" if "caption" in values else "no caption")
    return annotation


def is_missing(value: Any) -> bool:
    """Whether a cell says nothing."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


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
    columns = settings.columns
    names = {name: getattr(columns, name) or name for name in ("caption", "text", "label", "flow")}
    found = {name: content[key] for name, key in names.items() if not is_missing(content.get(key))}
    if "caption" not in found and "text" in found and columns.text is None:
        found["caption"] = found.pop("text")
    return found


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


def _whole_number(value: Any) -> int | None:
    if value is None:
        return None
    try:
        number = int(value.strip()) if isinstance(value, str) else value
        if isinstance(number, bool) or number != int(number) or not 0 <= number < 2**63:
            raise ValueError(number)
        return int(number)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadExample(f"the label must be a whole number, got {value!r:.80}") from error


def _number(value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadExample(f"the flow must be a number, got {value!r:.80}") from error
    if not math.isfinite(number) or number < 0:
        raise BadExample(f"the flow must be a number of at least 0, got {value!r:.80}")
    return number
