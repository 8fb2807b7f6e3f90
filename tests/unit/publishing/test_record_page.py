"""docs/record.md is the schema that others read record.json by."""

import dataclasses
import re
from pathlib import Path

from hf_mtcompress import records

PAGE = Path(__file__).parents[3] / "docs" / "record.md"


def test_page_is_in_step_with_the_classes():
    """A field that was renamed in the code and not on the page breaks the scripts of whoever reads the page."""
    sections = re.compile(r"^## (\w+)$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    found = {
        heading: dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \| .+ \|$", body, re.MULTILINE))
        for heading, body in sections.findall(PAGE.read_text(encoding="utf-8"))
    }
    found.pop("Definitions")
    expected = {
        name: {field.name: type_text(field.type).replace("|", "\\|") for field in dataclasses.fields(cls)}
        for name, cls in vars(records).items()
        if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls is not records.Form
    }
    assert found == expected


def type_text(annotation: object) -> str:
    text = annotation.__name__ if type(annotation) is type else str(annotation)
    return re.sub(r"typing\.|hf_mtcompress\.records\.\w+\.", "", text)
