"""Local paths are taken out, everything else stays as it was."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_mtcompress.publishing.portable import local_paths_in, portable, portable_recipe, secrets_in, without_secrets


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/someone/models/base", "base"),
        ("../shared/data/snips", "snips"),
        ("~/models/base", "base"),
        ("C:\\Users\\x\\base", "base"),
        ("file:///srv/base", "base"),
        ("data/snips", "data/snips"),
        ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("loaded from /tmp/x/y today", "loaded from y today"),
        ("/", "/"),
        ("https://example.com/home/x", "https://example.com/home/x"),
        ({"a": ["/mnt/a/b", 3, None]}, {"a": ["b", 3, None]}),
    ],
)
def test_portable(value: Any, expected: Any):
    """A path left in tells where somebody works; a Hub id cut in two loads something else."""
    assert portable(value) == expected
    assert portable(portable(value)) == expected


def test_recipe_without_local_paths_is_untouched():
    """Comments explain a recipe; parsing and dumping loses them."""
    text = "# why\nname: x # inline\nencoder: {path: example/encoder}\n"
    assert portable_recipe(text) == text


def test_encoder_goes_by_its_hub_id():
    """The folder's name alone loads nothing anywhere."""
    text = "# head\nencoder: {path: /opt/x/encoder, hub_id: example/encoder}\n"
    changed = portable_recipe(text)
    assert changed.startswith("# head\n")
    assert yaml.safe_load(changed) == {"encoder": {"path": "example/encoder", "hub_id": "example/encoder"}}


def test_paths_of_this_machine_are_found(tmp_path: Path):
    """The paths that leak are those of the machine that pushes."""
    assert local_paths_in(f'{{"source": "{tmp_path}/model"}}') == [f"{tmp_path}/model"]


def test_secrets():
    """A secret must be named by its kind only: messages are pasted into bug reports."""
    token = "hf_" + "Ab1" * 11
    assert secrets_in(f"x {token} y") == ["a Hugging Face token"]
    assert without_secrets(f"x {token} y") == "x *** y"
    assert secrets_in("hf_mtcompress hf_hub_download") == []
