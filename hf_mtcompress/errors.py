"""Every exception the package raises on purpose.

Each class is also a familiar built-in, so that code which does not know this package still catches it. Messages say
what was expected, what was found and what to do. The command line prints them without a traceback and exits with 2.
"""

from typing import Any


class MTCompressError(Exception):
    """Root of all errors of this package."""


class RecipeError(MTCompressError, ValueError):
    """A recipe cannot be run as written; `problems` holds one line for each mistake."""

    def __init__(self, problems: list[str] | str, source: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.source = source
        where = f" in {source}" if source else ""
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''}{where}:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


class TaskError(MTCompressError, ValueError):
    """A task is declared in a way that cannot work: name, labels, head or metric."""


class DataError(MTCompressError, ValueError):
    """Rows do not fit the task: missing column, empty split, label outside the list."""


class UnsupportedEncoderError(MTCompressError, ValueError):
    """The encoder has no structure that the wanted operation understands."""


class TrainingError(MTCompressError, RuntimeError):
    """Training cannot go on, for example because the loss is not a number."""


class QualityError(MTCompressError, ValueError):
    """What was saved keeps less of the model it was made from than was asked for."""


class ArtifactError(MTCompressError, OSError):
    """A folder or file is missing, not writable, of a newer format, or does not reload."""


class PublishingError(MTCompressError, RuntimeError):
    """The card or the upload was refused."""


class MissingExtraError(MTCompressError, ImportError):
    """An optional dependency is needed; the message holds the command that installs it."""


def mistakes(error: Any) -> str:
    """What pydantic says of the first values that do not fit, in one line."""
    found = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
    return "; ".join(found[:3]) + ("; ..." if len(found) > 3 else "")


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
