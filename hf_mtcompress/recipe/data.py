"""Where the rows of a task come from."""

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What `datasets.load_dataset` takes, and which split plays which role.

    Keys that are not listed here (such as `delimiter` of the csv builder) are builder arguments and collected in
    `builder_arguments`; `load_dataset` refuses those that the builder does not know.

    ```yaml
    data: {path: json, data_dir: data/snips, data_files: {train: train.jsonl, test: test.jsonl}}
    ```
    """

    path: str
    """A dataset of the Hub, a local folder, or a packaged builder: json, csv, parquet, text, imagefolder."""
    name: str | None = None
    """Configuration of a data set that has several."""
    data_dir: str | None = None
    """Folder of the files; relative to the recipe, or to the current folder when given on the command line. Where
    `path` is a Hub data set or a local folder: a folder inside it."""
    data_files: str | tuple[str, ...] | dict[str, str | tuple[str, ...]] | None = None
    """File, files, or files by split; relative to `data_dir` where that is given, else as `data_dir`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    splits: dict[Role, str] = field(default_factory=dict)
    """Split that plays a role, where the names differ; slicing such as `train[:1000]` works."""
    max_rows: int | dict[Role, int] | None = None
    """At most this many rows of a split, drawn with the recipe's seed."""
    dataset_id: str | None = None
    """Name of the data set on the card."""
    license: str | None = None
    """Licence of the data on the card."""
    builder_arguments: dict[str, Any] = field(default_factory=dict)
    """Filled from keys of `data` that are not listed here; only an argument that looks like one of them is put here."""
