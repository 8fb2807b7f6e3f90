"""How what a run saved is opened: the places, the code for each, and what has to be installed."""

import json

from hf_mtcompress.publishing.facts import artefacts_of, delivered_artefact, delivered_step, is_vanilla_shape, tasks_of
from hf_mtcompress.publishing.figures import Figures
from hf_mtcompress.publishing.metadata import PIPELINES
from hf_mtcompress.publishing.repository import repository_layout
from hf_mtcompress.records import FORMS, Artefact, RunRecord, StepRecord

AUTO_CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
}


def marked_name(record: RunRecord, step: StepRecord, artefact: Artefact) -> str:
    """Name of a step, bold where the artefact is what the run was made for."""
    return f"**`{step.name}`**" if artefact is delivered_artefact(record) else f"`{step.name}`"


class Usage:
    """The section of the card on use.

    Args:
        record: what happened.
        figures: prints its numbers and texts.
        repo_id: where the card is published; None for the folders of the run.
    """

    def __init__(self, record: RunRecord, figures: Figures, repo_id: str | None) -> None:
        self.record = record
        self.n = figures
        self.repo_id = repo_id
        self.layout = repository_layout(record)

    def places(self) -> list[list[str]]:
        """What lies where."""
        rows = [["folder", "what it is", "step", "opens with"]]
        if self.repo_id is not None:
            listed = [(place or ".", *found) for place, found in self.layout.items()]
        else:
            listed = [(artefact.folder, step, artefact) for step, artefact in artefacts_of(self.record)]
        for folder, step, artefact in listed:
            how = FORMS[artefact.form].opens_with
            if artefact.form == "vanilla" and not is_vanilla_shape(self.record, step):
                how = "transformers after `import hf_mtcompress`, one folder per task"
            which = "one task each" if FORMS[artefact.form].layout == "tasks" else "all tasks"
            what = f"{which}, {self.n.text(artefact.precision)}"
            rows.append([f"`{folder}`", what, marked_name(self.record, step, artefact), how])
        return rows

    def not_published(self) -> list[str]:
        """Saved forms of the run that are not in the repository."""
        if self.repo_id is None:
            return []
        kept = {artefact.folder for _, artefact in self.layout.values()}
        return [
            f"`{step.name}` ({artefact.form}, {self.n.text(artefact.precision)})"
            for step, artefact in artefacts_of(self.record)
            if artefact.folder not in kept
        ]

    def _place(self, form: str) -> tuple[str, StepRecord, Artefact] | None:
        for place, (step, artefact) in self.layout.items():
            if artefact.form == form:
                return (place if self.repo_id is not None else artefact.folder), step, artefact
        return None

    def _example(self) -> str:
        kinds = {task.kind for task in tasks_of(self.record, delivered_step(self.record)).values()}
        return '"picture.png"' if kinds == {"image-classification"} else '"Put your own text here."'

    def snippets(self) -> list[tuple[str, str]]:
        """Heading and Python code for each way of loading."""
        return [
            snippet
            for snippet in (
                self._torch_snippet(),
                self._vanilla_snippet(),
                *(
                    self._predictor_snippet(form.name, f"in {form.runtime}")
                    for form in FORMS.values()
                    if form.layout == "graph"
                ),
                *(
                    self._predictor_snippet(form.name, f"with {form.extra}", f"  # needs {form.extra}")
                    for form in FORMS.values()
                    if form.in_few_bits
                ),
            )
            if snippet is not None
        ]

    def _torch_snippet(self) -> tuple[str, str] | None:
        found = self._place("torch")
        if found is None:
            return None
        source = self.repo_id or found[0]
        code = f"""\
import hf_mtcompress  # makes the model known to transformers; runs no code from the repository
from transformers import AutoModel, pipeline

answer = pipeline("multi-task", model={_quoted(source)})
print(answer({self._example()}))

model = AutoModel.from_pretrained({_quoted(source)})  # logits_<task> for every task, and last_hidden_state"""
        return f"All tasks at once, in PyTorch (step `{found[1].name}`)", code

    def _vanilla_snippet(self) -> tuple[str, str] | None:
        found = self._place("vanilla")
        if found is None:
            return None
        place, step, _ = found
        tasks = [(name, task) for name, task in tasks_of(self.record, step).items() if task.kind in PIPELINES]
        if not tasks:
            return None
        name, task = tasks[0]
        plain = is_vanilla_shape(self.record, step)
        auto, tag = AUTO_CLASSES[task.kind], PIPELINES[task.kind]
        processor, argument = ("AutoTokenizer", "tokenizer")
        if task.kind == "image-classification":
            processor, argument = ("AutoImageProcessor", "image_processor")
        first = "" if plain else "import hf_mtcompress  # lets transformers build the pruned shapes\n"
        if self.repo_id is not None:
            origin = f'"{self.repo_id}", subfolder="{place}/{name}"'
        else:
            origin = f'"{place}/{name}"'
        code = f"""\
{first}from transformers import {auto}, {processor}, pipeline

model = {auto}.from_pretrained({origin})
{argument} = {processor}.from_pretrained({origin})
answer = pipeline("{tag}", model=model, {argument}={argument})
print(answer({self._example()}))"""
        title = "One task, with transformers alone" if plain else "One task, with the stock classes"
        return f"{title} (step `{step.name}`; here `{name}`)", code

    def _predictor_snippet(self, form: str, how: str, comment: str = "") -> tuple[str, str] | None:
        found = self._place(form)
        if found is None:
            return None
        place, step, artefact = found
        fetch, folder = self._download(place)
        code = f"""\
{fetch}from hf_mtcompress import load_predictor

predictor = load_predictor({folder}){comment}
print(predictor.predict([{self._example()}]))"""
        return f"All tasks at once, {how} (step `{step.name}`, {self.n.text(artefact.precision)})", code

    def _download(self, place: str) -> tuple[str, str]:
        if self.repo_id is None:
            return "", f'"{place}"'
        code = "from pathlib import Path\n\nfrom huggingface_hub import snapshot_download\n"
        return (
            code,
            f'Path(snapshot_download("{self.repo_id}", allow_patterns="{place}/*")) / "{place}"',
        )

    def requirement(self) -> str:
        """What pip has to install, with the extras of the forms that the run made."""
        forms = {artefact.form for _, artefact in artefacts_of(self.record)}
        extras = [form.extra for form in FORMS.values() if form.name in forms and form.extra is not None]
        return f'"hf_mtcompress[{",".join(extras)}]"' if extras else "hf_mtcompress"


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
