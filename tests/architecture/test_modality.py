"""What an encoder reads, texts or images, is known in one file: everything else asks its reader."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hf_mtcompress"
READERS = "data/readers.py"
ALLOWED: dict[str, dict[str, str]] = {
    # By pattern in the code: the files beside it that may hold it, each with its reason.
    r"input_ids": {"compression/vocabulary.py": "cuts the tokenizer itself"},
    r"token_type_ids|type_vocab_size": {
        "compression/vocabulary.py": "cuts the tokenizer itself",
        "model/modeling.py": "leaves out what a tokenizer makes for encoders that take none",
    },
    r"model_input_names": {},
    r"AutoImageProcessor|AutoTokenizer|AutoProcessor|PreTrainedTokenizer|BaseImageProcessor|ProcessorMixin": {
        "publishing/usage.py": "writes the code that a card shows, by kind of task",
    },
    r"image_processor": {
        "formats/pipeline.py": "what transformers hands to a pipeline comes under this name",
        "publishing/usage.py": "writes the code that a card shows, by kind of task",
    },
    r"'image'|'images'": {
        "recipe/tasks.py": "says what a kind of task reads",
        "tasks/image_classification.py": "names a column of its own",
    },
    r"isinstance\(.*ImageClassification|== \{?'image-classification'": {
        "publishing/usage.py": "writes the code that a card shows, by kind of task",
    },
}


@cache
def code() -> dict[str, str]:
    """The modules without docstrings and comments, by their place in the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value = ast.Constant(None)
        found[path.relative_to(PACKAGE).as_posix()] = ast.unparse(tree)
    return found


def test_pixels_are_named_in_one_file():
    """Wherever else a file asks for them, an encoder of texts and images needs a branch of its own there."""
    files = [path for ending in ("py", "mjs", "html") for path in PACKAGE.rglob(f"*.{ending}")]
    found = [path.relative_to(PACKAGE).as_posix() for path in files if "pixel_values" in path.read_text("utf-8")]
    assert found == [READERS]


@pytest.mark.parametrize("pattern", ALLOWED)
def test_nobody_else_asks_what_is_read(pattern: str):
    """From the name of an input, the class of a processor or the kind of a task; the list holds no file in vain."""
    found = {place for place, text in code().items() if re.search(pattern, text)}
    assert found - {READERS} == set(ALLOWED[pattern])
