"""What somebody wrote or keeps in a run's folder is theirs: no command deletes or replaces it."""

from pathlib import Path

import pytest

from hf_mtcompress.artifacts import CARD, CARD_ASIDE, RECIPE, RECORD, WORK
from hf_mtcompress.cli import main
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.publishing.card import is_untouched
from hf_mtcompress.publishing.figures import OWN_WORDS_BEGIN, OWN_WORDS_END, own_words_of
from hf_mtcompress.records import to_json
from hf_mtcompress.runs.results import load_record, write_card
from hf_mtcompress.runs.run import prepare_output
from tests.tiny_recipe import write_tiny_recipe
from tests.unit.publishing.factory import make_record

OWN = "Made for the night shift.\n\n<!-- ask Mo about the name -->\n\n| a | b |\n| - | - |"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder whose card has words of its author."""
    (tmp_path / RECORD).write_text(to_json(make_record()))
    card = write_card(tmp_path, load_record(tmp_path), "name: tiny\n")
    assert own_words_of(card.read_text()) is None
    between = card.read_text().partition(OWN_WORDS_BEGIN)[2].partition(OWN_WORDS_END)[0]
    card.write_text(card.read_text().replace(between, f"\n{OWN}\n"))
    return tmp_path


def test_own_words_stay_in_every_new_card(folder: Path) -> None:
    """A repeated run, or `card`, would else delete what took longest to write."""
    for _ in range(2):
        assert main(["card", str(folder)]) == 0
        text = (folder / CARD).read_text()
        assert own_words_of(text) == OWN
        assert is_untouched(text)


def test_a_card_that_was_worked_on_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = (folder / CARD).read_text().replace("## ", "## My ", 1)
    (folder / CARD).write_text(mine)
    assert main(["card", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / CARD_ASIDE)
    assert (folder / CARD).read_text() == mine
    assert own_words_of((folder / CARD_ASIDE).read_text()) == OWN
    (folder / CARD).unlink()
    assert write_card(folder, load_record(folder), None) == folder / CARD
    assert not (folder / CARD_ASIDE).exists()


@pytest.mark.parametrize("name", [RECIPE, CARD, "assets/photo.png"])
def test_a_folder_of_somebody_else_is_no_place_for_a_run(name: str, tmp_path: Path) -> None:
    """`--output .` would replace the recipe by its resolved form, and the project's README by a card."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ArtifactError, match=f"expected a folder of its own for the run, found {Path(name).parts[0]}"):
        prepare_output(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [Path(name).parts[0]]
    (tmp_path / WORK).mkdir()
    prepare_output(tmp_path)


def test_a_folder_called_as_a_step_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_tiny_recipe(tmp_path)
    (tmp_path / "run" / "teacher").mkdir(parents=True)
    (tmp_path / "run" / "teacher" / "notes.txt").write_text("mine")
    for options in ([str(tmp_path / "run")], [str(tmp_path)]):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert main(["run", str(recipe), "--output", *options]) == 2
        for path, content in before.items():
            assert path.read_bytes() == content
    message = capsys.readouterr().err
    assert "expected the step 'teacher' of this run at" in message
    assert "expected a folder of its own for the run, found recipe.yaml" in message
