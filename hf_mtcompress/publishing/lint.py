"""Checks on a model card that need no network: what is found is returned, one line for each problem."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from hf_mtcompress.publishing.card import allowed_numbers
from hf_mtcompress.publishing.figures import numbers_in
from hf_mtcompress.publishing.hub_terms import BASE_MODEL_RELATIONS, LICENSES, PIPELINE_TAGS
from hf_mtcompress.publishing.metadata import card_metadata
from hf_mtcompress.publishing.portable import host_names_in, local_paths_in, secrets_in
from hf_mtcompress.records import RunRecord

REQUIRED_KEYS = ("library_name", "license", "pipeline_tag", "tags")
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")
_FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"\\.|(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)")
"""What is no link, whatever brackets it has: an escaped sign, or a code span."""


def lint_card(text: str, folder: Path | None = None, record: RunRecord | None = None) -> list[str]:
    """Check a model card without the network.

    Args:
        text: the card, front matter included.
        folder: where relative links must lead to a file; None skips that.
        record: what numbers must stand in; None skips that.

    Returns:
        One line for each problem; empty when the card may be published.
    """
    exists = None if folder is None else lambda name: (Path(folder) / name).exists()
    return [*_lint(text, exists), *([] if record is None else number_problems(text, record))]


def lint_card_of_files(text: str, names: set[str], record: RunRecord | None = None) -> list[str]:
    """As `lint_card`, for a repository that holds the files `names`."""
    return [*_lint(text, names.__contains__), *([] if record is None else number_problems(text, record))]


def _lint(text: str, exists: Any) -> list[str]:
    problems = []
    metadata, problem = front_matter(text)
    if problem is not None:
        problems.append(problem)
    else:
        problems += metadata_problems(metadata)
    if exists is not None:
        problems += [
            f"expected the link '{target}' to lead to a file beside the card, found none; write it or unlink it"
            for target in _relative_links(text)
            if not exists(target)
        ]
    problems += [
        f"expected no path of a machine, found '{path}'; name the file or folder without it"
        for path in dict.fromkeys(local_paths_in(text))
    ]
    problems += [
        f"expected no secret, found what looks like {kind}; take it out and revoke it" for kind in secrets_in(text)
    ]
    problems += [f"expected no host name, found '{name}'; take it out" for name in host_names_in(text)]
    return problems


def front_matter(text: str) -> tuple[dict[str, Any], str | None]:
    """The metadata of a card, and a problem where there is none to be read."""
    found = _FRONT_MATTER.match(text)
    if found is None:
        return {}, "expected front matter between two lines of ---, found none at the head of the card"
    try:
        data = yaml.safe_load(found.group(1))
    except yaml.YAMLError as error:
        return {}, f"expected front matter in YAML, found a mistake: {' '.join(str(error).split())}"
    if not isinstance(data, dict):
        return {}, f"expected front matter with keys and values, found {type(data).__name__}"
    return data, None


def metadata_problems(metadata: dict[str, Any]) -> list[str]:
    """What is missing or unknown in the front matter."""
    problems = [
        f"expected '{key}' in the front matter, found none; "
        + ("set publish.license in the recipe" if key == "license" else "render the card again or add it")
        for key in REQUIRED_KEYS
        if not metadata.get(key)
    ]
    for key, known, remedy in (
        ("license", LICENSES, "'other' together with license_name where it is not among the Hub's"),
        ("pipeline_tag", PIPELINE_TAGS, "one of the Hub's"),
        ("base_model_relation", BASE_MODEL_RELATIONS, f"one of {', '.join(sorted(BASE_MODEL_RELATIONS))}"),
    ):
        values = metadata.get(key) or []
        problems += [
            f"expected a known {key}, found '{value}'; use {remedy}"
            for value in (values if isinstance(values, list) else [values])
            if value not in known
        ]
    try:
        # The names of the arguments are the keys of the front matter, `model-index` included.
        ModelCardData(**{str(key): value for key, value in metadata.items()})
    except (ValueError, TypeError) as error:
        problems.append(f"expected metadata that huggingface_hub reads, found: {' '.join(str(error).split())}")
    for value, place in _metric_values(metadata):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            problems.append(f"expected a finite number for {place} in model-index, found {value!r}")
    return problems


def number_problems(text: str, record: RunRecord) -> list[str]:
    """Every number of the card that the record does not hold."""
    allowed = allowed_numbers(record)
    problems = [
        f"expected every number to stand in the record, found {number}; render the card again, "
        "or put it between the marks of your own words"
        for number in dict.fromkeys(numbers_in(text))
        if number not in allowed
    ]
    metadata, problem = front_matter(text)
    if problem is None:
        known = {value for value, _ in _metric_values(card_metadata(record))}
        problems += [
            f"expected {place} in model-index as it stands in the record, found {value!r}; render the card again"
            for value, place in _metric_values(metadata)
            if value not in known
        ]
    return problems


def _metric_values(metadata: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    index = metadata.get("model-index")
    for entry in index if isinstance(index, list) else []:
        results = entry.get("results") if isinstance(entry, dict) else None
        for result in results if isinstance(results, list) else []:
            metrics = result.get("metrics") if isinstance(result, dict) else None
            for metric in metrics if isinstance(metrics, list) else []:
                if isinstance(metric, dict):
                    yield metric.get("value"), str(metric.get("name") or metric.get("type"))


def _relative_links(text: str) -> Iterator[str]:
    for match in _LINK.finditer(_SPAN.sub("", _FENCED.sub("", _FRONT_MATTER.sub("", text)))):
        target = match.group(1).partition("#")[0]
        if target and "://" not in target and not target.startswith("mailto:"):
            yield target
