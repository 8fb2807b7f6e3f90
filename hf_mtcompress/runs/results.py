"""A run's record, card and pictures, written and read."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_mtcompress import records
from hf_mtcompress.artifacts import ASSETS, CARD, CARD_ASIDE, RECIPE, RECORD, write_text
from hf_mtcompress.errors import ArtifactError, MTCompressError, first_line
from hf_mtcompress.publishing.card import (
    INTERFERENCE_PICTURE,
    PICTURE,
    PICTURES,
    SENSITIVITY_PICTURE,
    is_untouched,
    render_card,
)
from hf_mtcompress.publishing.figures import own_words_of
from hf_mtcompress.publishing.picture import draw_comparison, draw_interference
from hf_mtcompress.publishing.sensitivity import draw_sensitivity
from hf_mtcompress.recipe.load import dump_recipe
from hf_mtcompress.recipe.sections import plain_settings
from hf_mtcompress.records import RunRecord
from hf_mtcompress.steps.run_context import RunContext

logger = logging.getLogger(__name__)


def write_results(context: RunContext, record: RunRecord) -> None:
    """Record, card and pictures of a run that is measured."""
    assets = context.output / ASSETS
    assets.mkdir(exist_ok=True)
    if context.recipe.publish is not None:
        record.publish = plain_settings(context.recipe.publish)
    for name in PICTURES:
        (assets / name).unlink(missing_ok=True)  # where there is nothing to draw now, an older one would be shown
    draw_comparison(record, assets / PICTURE)
    draw_interference(record, assets / INTERFERENCE_PICTURE)
    draw_sensitivity(record, assets / SENSITIVITY_PICTURE)
    write_text(context.output / RECORD, records.to_json(record))
    write_card(context.output, record, dump_recipe(context.recipe, portable=True))


def write_card(folder: Path, record: RunRecord, recipe_text: str | None) -> Path:
    """Write the card of a run around what its author wrote between the marks.

    Returns:
        Where it stands: beside the card that is there, if somebody wrote elsewhere in that one.

    Raises:
        ArtifactError: it cannot be written.
    """
    path, aside = folder / CARD, folder / CARD_ASIDE
    # What is no text was changed, too.
    existing = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    pictures = [name for name in PICTURES if (folder / ASSETS / name).is_file()]
    own_words = None if existing is None else own_words_of(existing)
    text = render_card(record, recipe_text, pictures=pictures, own_words=own_words)
    if existing is not None and not is_untouched(existing):
        logger.warning(
            "%s was changed by hand and stays as it is; the new card is %s. Text between the marks 'own words' is kept "
            "in new cards",
            path,
            aside.name,
        )
        write_text(aside, text)
        return aside
    write_text(path, text)
    aside.unlink(missing_ok=True)
    return path


def load_record(folder: Path) -> RunRecord:
    """The record of a run.

    Raises:
        ArtifactError: there is none, or it is of a newer format.
    """
    path = folder / RECORD
    try:
        return records.run_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            f"expected the folder of a run with {RECORD}, found none in {folder}; run a recipe first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"expected a readable {path.name} in {folder}, found: {error}; run the recipe again"
        ) from error


@contextmanager
def told_from(folder: Path) -> Iterator[None]:
    """Say that a record is damaged where what is told of it does not find what a run writes.

    Raises:
        ArtifactError: it is.
    """
    try:
        yield
    except MTCompressError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"expected {RECORD} and {RECIPE} in {folder} as a run writes them, found something else "
            f"({type(error).__name__}: {first_line(error)}); run the recipe again"
        ) from error


def last_record(output: Path) -> RunRecord | None:
    """What an earlier call measured, if it came that far."""
    try:
        return load_record(output)
    except ArtifactError:
        return None
