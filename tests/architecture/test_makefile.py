"""`make` explains itself, and what the documents name can be made."""

import re
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def targets() -> set[str]:
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    return set(phony[1].split())


def test_help_lists_every_target():
    done = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  make ([a-z-]+) ", done.stdout, re.MULTILINE)) == targets()


def test_promised_targets_exist():
    assert {"quickstart", "test", "check", "fix", "docs"} <= targets()


def test_documents_name_targets_that_exist():
    named = set()
    for document in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("recipes/*.md")]:
        named.update(re.findall(r"^make ([a-z-]+)", document.read_text(encoding="utf-8"), re.MULTILINE))
    assert "quickstart" in named
    assert named <= targets()
