"""Write the table of results in README.md from the record of the quickstart's run in model_cards/quickstart.

Command: python docs/make_results.py [RUN]
With RUN, the folder of a run, its card, record, recipe and pictures are first copied to model_cards/quickstart.
"""

import json
import shutil
import sys
from pathlib import Path

from hf_mtcompress.artifacts import ASSETS, CARD, RECIPE, RECORD
from hf_mtcompress.publishing.figures import NOT_TIMED
from hf_mtcompress.publishing.portable import portable_recipe
from hf_mtcompress.publishing.report import report_rows
from hf_mtcompress.records import RunRecord, run_from_dict

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "README.md"
SHOWN = ROOT / "model_cards" / "quickstart"
BEGIN, END = "<!-- quickstart table: begin -->\n", "<!-- quickstart table: end -->"


def table(record: RunRecord) -> str:
    """One line a step: scores by task, what is kept, size and times."""
    header = ["step", *record.tasks, "kept", "worst task", "MB", "batch 1", "batch 32"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    lines += [
        [
            f"`{row['step']}`",
            *(f"{score:.3f}" for score in row["scores"].values()),
            f"{100 * row['retention']:.1f} %",
            f"{100 * row['worst_task_retention']:.1f} %",
            f"{row['size_mb']:.1f}",
            *(
                NOT_TIMED if (ratio := row[f"latency_b{size}_ratio"]) is None else f"{1 / ratio:.1f} x"
                for size in (1, 32)
            ),
        ]
        for row in report_rows(record)
    ]
    metrics = ", ".join(f"{name} {task.metric}" for name, task in record.tasks.items())
    rows = next(iter(record.tasks.values())).rows["test"]
    conditions = record.benchmark or {}
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        f"{text}\n\nTest scores ({metrics}) on {rows:,} sentences; batch 1 and 32: times as fast as the teacher in "
        f"torch float32, {conditions['tokens']} tokens, {conditions['threads']} threads, "
        f"{record.environment['processor']}.\n"
    )


def render(page: str, record: RunRecord) -> str:
    """The page with the table between its two marks written anew."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table(record) + END + rest.split(END)[1]


def shown_record() -> RunRecord:
    """The record that the page speaks of."""
    return run_from_dict(json.loads((SHOWN / RECORD).read_text(encoding="utf-8")))


def main() -> None:
    """Copy a run if one is given, then write the page."""
    if len(sys.argv) > 1:
        run = Path(sys.argv[1])
        shutil.rmtree(SHOWN, ignore_errors=True)
        shutil.copytree(run / ASSETS, SHOWN / ASSETS)
        for name in (CARD, RECORD):
            shutil.copy(run / name, SHOWN / name)
        (SHOWN / RECIPE).write_text(portable_recipe((run / RECIPE).read_text(encoding="utf-8")), encoding="utf-8")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), shown_record()), encoding="utf-8")


if __name__ == "__main__":
    main()
