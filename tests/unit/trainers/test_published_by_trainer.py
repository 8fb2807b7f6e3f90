"""What a trainer saves and publishes of a multi-task model."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi
from transformers import pipeline
from transformers.utils import hub as transformers_hub

from hf_mtcompress.errors import TrainingError
from tests.unit.publishing.hub_stub import GOOD_TOKEN, running_hub
from tests.unit.trainers.test_multitask import build


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_says_what_the_trainer_knows(tmp_path: Path) -> None:
    """The one of transformers names neither the tasks nor a score, and no encoder."""
    trainer = build(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    trainer.create_model_card(license="mit", language="en", tags="mine", dataset="me/rows")
    card = (tmp_path / "README.md").read_text()
    scores = trainer.scores
    for name, task in trainer.tasks.items():
        assert f"| `{name}` | {task.kind} |" in card
        assert f"| {task.metric} | {scores[name][str(task.metric)]:.4f} |" in card
    assert "`bad`, `plain`, `good`" in card
    assert f"{trainer.state.log_history[-2]['eval_average']:.4f}" in card
    front = front_matter(card)
    assert (front["license"], front["language"], front["datasets"]) == ("mit", "en", "me/rows")
    assert {"mine", "multi-task", "hf_mtcompress"} == set(front["tags"])
    found = {entry["task"]["name"]: entry["metrics"][0]["value"] for entry in front["model-index"][0]["results"]}
    assert found == {name: scores[name][str(task.metric)] for name, task in trainer.tasks.items()}
    assert str(tmp_path) not in card


def test_a_card_has_the_scores_of_the_weights_that_are_saved(tmp_path: Path) -> None:
    """Those of the last evaluation belong to other weights than the best, or than those after more steps."""
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trainer = build(
        tmp_path / "best",
        **settings,
        load_best_model_at_end=True,
        metric_for_best_model="strength_mae",
        max_steps=4,
        learning_rate=0.05,
    )
    trainer.train()
    assert trainer.state.best_global_step != 4
    assert trainer.scores["strength"]["mae"] == trainer.state.best_metric
    trainer.create_model_card()
    score = trainer.scores["strength"]["pearson"]
    assert f"| pearson | {score:.4f} |" in (tmp_path / "best" / "README.md").read_text()
    trainer = build(tmp_path / "on", max_steps=1)
    trainer.evaluate()
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "on" / "README.md").read_text()
    assert card.count("| not measured |") == 3
    assert "model-index" not in front_matter(card)


def test_nothing_that_is_saved_is_a_pickle_or_tells_of_this_machine(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    assert not [path.name for path in files if str(tmp_path).encode() in path.read_bytes()]
    answer: Any = pipeline("multi-task", model=str(tmp_path))
    assert answer("the happy fox sleeps near the forest")["mood"]


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub calls httpx so
def test_what_is_pushed_is_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transformers_hub, "_hf_api", HfApi(endpoint=server.url))
        pushed = push(server, tmp_path)
    assert "training_args.bin" not in pushed
    assert b"`mood`" in pushed["README.md"]
    assert not [name for name, content in pushed.items() if str(tmp_path).encode() in content]


def push(server: Any, folder: Path) -> dict[str, bytes]:
    trainer = build(folder / "model", max_steps=1, hub_model_id="me/model", hub_token=GOOD_TOKEN)
    trainer.train()
    (folder / "model" / "_teacher_cache").mkdir()
    (folder / "model" / "_teacher_cache" / "answers.safetensors").write_bytes(b"x")
    trainer.push_to_hub(token=GOOD_TOKEN)
    return server.repositories["me/model"].files["main"]


def test_uploads_while_it_trains_are_refused(tmp_path: Path) -> None:
    """They copy the arguments, a pickle, beside the weights."""
    with pytest.raises(TrainingError, match=r"push_to_hub: expected hub_strategy='end'"):
        build(tmp_path, push_to_hub=True, hub_token=GOOD_TOKEN)
