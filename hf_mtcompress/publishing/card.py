"""The model card: text made from the record alone, so that it can be made again and checked."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_mtcompress.publishing.facts import (
    ancestors,
    artefacts_of,
    batch_sizes,
    beaten_reference,
    budget_of,
    comparison_of,
    delivered_artefact,
    delivered_step,
    every_task_left_out,
    final_scores,
    interfering_steps,
    latency_of,
    layers_of,
    parent_of,
    reference_artefact,
    short_precision,
    tasks_left_out,
    tasks_of,
    vocabulary_of,
    was_busy,
)
from hf_mtcompress.publishing.figures import (
    NO_OWN_WORDS,
    NOT_MEASURED,
    NOT_TIMED,
    OWN_WORDS_BEGIN,
    OWN_WORDS_END,
    Figures,
    without_own_words,
)
from hf_mtcompress.publishing.limitations import Limitations
from hf_mtcompress.publishing.markup import inside_html, text
from hf_mtcompress.publishing.metadata import metadata_of
from hf_mtcompress.publishing.portable import portable, portable_recipe
from hf_mtcompress.publishing.report import (
    gate_lines,
    lineage,
    markdown,
    pruning_lines,
    sparsity_lines,
    task_scores,
    vocabulary_lines,
)
from hf_mtcompress.publishing.sensitivity import sensitive_steps, sensitivity_rows, sensitivity_words
from hf_mtcompress.publishing.usage import Usage, marked_name
from hf_mtcompress.records import LatencyRecord, RunRecord, StepRecord, TaskRecord, run_from_dict, to_json

PICTURE = "comparison.png"
INTERFERENCE_PICTURE = "interference.png"
SENSITIVITY_PICTURE = "sensitivity.png"
PICTURES = (PICTURE, INTERFERENCE_PICTURE, SENSITIVITY_PICTURE)
MATRIX_TASKS = 12
"""Up to this many tasks a card shows cosines as a matrix, beyond it the pairs with most conflicts."""
MOST_CONFLICTS = 20

MADE = {
    "distill": "distilled",
    "prune": "pruned",
    "trim_vocabulary": "cut to a smaller vocabulary",
    "trim_weights": "trimmed of small weights",
}
"""What a kind of step does to a model, in words."""

_SEAL = "<!-- written by hf_mtcompress from the record, {} -->"


def render_card(
    record: RunRecord,
    recipe_text: str | None = None,
    repo_id: str | None = None,
    *,
    pictures: Collection[str] = PICTURES,
    own_words: str | None = None,
) -> str:
    """Write the model card of a run.

    Args:
        record: what happened; every number of the card stands in it.
        recipe_text: the recipe as YAML, folded into the card without local paths.
        repo_id: where the card is published; without it the snippets name the folders of the run.
        pictures: files of `assets` that are there to be shown: `comparison.png` (see `draw_comparison`),
            `interference.png` where a step logged how its tasks got along (`draw_interference`), `sensitivity.png`
            where one measured what few bits do (`draw_sensitivity`).
        own_words: text of the author, shown as it is and free of checks on numbers (see `own_words_of`).

    Returns:
        Markdown with YAML front matter.

    Raises:
        PublishingError: the record holds no saved step.
    """
    return _render(record, recipe_text, repo_id, pictures, own_words)[0]


def allowed_numbers(record: RunRecord) -> set[str]:
    """Every number, as text, that a card of this record may print."""
    return _render(record, None, None, PICTURES, None)[1].allowed


def _render(
    record: RunRecord,
    recipe_text: str | None,
    repo_id: str | None,
    pictures: Collection[str],
    own_words: str | None,
) -> tuple[str, Figures]:
    # Local paths may stand in the settings of a step; the card shows the record as others may see it.
    record = run_from_dict(portable(json.loads(to_json(record))))
    figures = Figures(record)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML; strings of the record are escaped by `markup`
    )
    page = _Page(record, figures, repo_id)
    text = environment.get_template("card.md.jinja").render(
        page=page,
        n=figures,
        record=record,
        front_matter=metadata_of(record, repo_id).to_yaml(),
        table=markdown,
        recipe=portable_recipe(recipe_text).strip() if recipe_text else None,
        pictures=pictures,
        own_words="\n".join([OWN_WORDS_BEGIN, own_words or NO_OWN_WORDS, OWN_WORDS_END]),
    )
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return f"{text}\n{_SEAL.format(_digest(text))}\n", figures


def is_untouched(text: str) -> bool:
    """Whether a card is as `render_card` wrote it, whatever stands between the marks of the author's own words."""
    body, _, seal = text.rstrip("\n").rpartition("\n\n")
    return seal == _SEAL.format(_digest(body + "\n"))


def _digest(text: str) -> str:
    return hashlib.sha256(without_own_words(text).encode()).hexdigest()[:16]


class _Page:
    """What the template shows, section by section, each as text or as rows of a table."""

    def __init__(self, record: RunRecord, figures: Figures, repo_id: str | None) -> None:
        self.record = record
        self.n = figures
        self.repo_id = repo_id
        self.step = delivered_step(record)
        self.artefact = delivered_artefact(record)
        self.reference = reference_artefact(record)
        self.is_reference = self.reference is not None and self.reference.folder == self.artefact.folder
        self.comparison = None if self.is_reference else comparison_of(record, self.artefact)
        self.scores = final_scores(self.artefact)
        self.title = (repo_id or record.name).rpartition("/")[2]
        self.use = Usage(record, figures, repo_id)
        self.limits = Limitations(record, figures)

    # ---- summary ----

    def summary(self) -> str:
        """One or two sentences with the numbers that matter."""
        record, n = self.record, self.n
        kinds = {step.kind for step in ancestors(record, self.step)}
        made = [word for kind, word in MADE.items() if kind in kinds]
        if "quantize" in kinds:
            made.append(f"quantized to {n.text(short_precision(self.artefact))}")
        layers = [len(part) for step in ancestors(record, self.step) for part in layers_of(step.structure).values()]
        model_type = record.encoder.get("model_type")
        encoder = f"{n.text(str(model_type))} encoder" if model_type else "encoder"
        encoder += f" of {n.plain(layers[0])} layers" if layers else ""
        tasks = tasks_of(record, self.step)
        names = ", ".join(f"`{name}`" for name in tasks)
        heads = f"one head for each of {n.plain(len(tasks))} tasks" if len(tasks) > 1 else "one task head"
        sentence = f"One {encoder} with {heads} ({names})"
        sentence += f", {_join(made)}. " if made else ". "
        return sentence + " ".join(self._claims())

    def _claims(self) -> list[str]:
        n, size = self.n, self.artefact.size
        reference_size = self.reference.size if self.reference else None
        claims = []
        if size is not None:
            claim = f"It takes {n.megabytes(size.weights_bytes)} on disk"
            if reference_size is not None and not self.is_reference:
                times = n.times(reference_size.weights_bytes, size.weights_bytes)
                claim += f"; its reference, step `{self.record.reference}`, takes {times} times as much"
            claims.append(claim + ".")
        ratios = [(row.batch_size, row.ratio_minimum) for row in self.artefact.latency if row.ratio_minimum]
        if ratios and not self.is_reference:
            speeds = _join([f"{n.times_faster(ratio)} times as fast at batch size {n.plain(b)}" for b, ratio in ratios])
            claims.append(f"On the processor named below it runs {speeds} (minimum of the timed calls).")
        busy = [n.plain(row.batch_size) for row in self.artefact.latency if row.not_measured is not None]
        if busy and not self.is_reference:
            claims.append(f"Its speed at batch size {_join(busy)} was {NOT_TIMED}.")
        comparison = self.comparison
        without = _join([f"`{name}`" for name in tasks_left_out(self.record, comparison)])
        if comparison is not None and comparison.retention is not None:
            claim = f"It keeps {n.percent(comparison.retention)} of the reference's {comparison.split} scores"
            if comparison.worst_task is not None and comparison.worst_task_retention is not None:
                claim += f" (worst task: `{comparison.worst_task}`, {n.percent(comparison.worst_task_retention)})"
            claims.append(claim + (f", without {without}." if without else "."))
        if without:
            claims.append(f"What it keeps of {without} is undefined: the reference is not above chance there.")
        claims += self.beaten()
        return claims

    def beaten(self) -> list[str]:
        """The sentence on a reference that something made from it beats."""
        n = self.n
        tasks = [
            f"`{name}` ({n.score(row['score'])} of `{step.name}` against {n.score(row['reference'])})"
            for name, (step, row) in beaten_reference(self.record).items()
        ]
        if not tasks:
            return []
        return [f"The reference is beaten on {_join(tasks)}, so it is probably undertrained."]

    # ---- at a glance ----

    def glance(self) -> list[list[str]]:
        """Reference and delivered model side by side."""
        n, reference, this = self.n, self.reference, self.artefact
        versus = reference is not None and not self.is_reference
        columns = [reference, this] if versus and reference is not None else [this]
        rows = [
            ["", *([f"reference (`{self.record.reference}`)"] if versus else []), f"this model (`{self.step.name}`)"]
        ]

        def add(label: str, cells: Sequence[str]) -> None:
            if any(cell != NOT_MEASURED for cell in cells):
                rows.append([label, *cells])

        sizes = [column.size for column in columns]
        add("parameters", [n.parameters(size.parameters if size else None) for size in sizes])
        add("of which embeddings", [n.parameters(size.embedding_parameters if size else None) for size in sizes])
        add("weights on disk", [n.megabytes(size.weights_bytes if size else None) for size in sizes])
        add("of which embeddings, on disk", [n.megabytes(size.embedding_bytes if size else None) for size in sizes])
        add("precision", [f"{n.text(column.precision)} ({column.form})" for column in columns])
        scores = [final_scores(column) for column in columns]
        split = self.scores.split if self.scores else "test"
        add(f"average of the main tasks ({split})", [n.score(one.average if one else None) for one in scores])
        if self.comparison is not None:
            comparison = self.comparison
            without = self.without()
            add(f"scores kept, mean of tasks{without}", ["", n.percent(comparison.retention)])
            add(f"scores kept above chance{without}", ["", n.percent(comparison.retention_above_chance)])
            add(f"scores kept, worst task{without}", ["", n.percent(comparison.worst_task_retention)])
        for batch_size in batch_sizes(self.record):
            latency = [latency_of(column, batch_size) for column in columns]
            label = f"time per call, batch size {n.plain(batch_size)} (minimum)"
            add(label, [self._milliseconds(one, one.minimum_ms if one else None) for one in latency])
        add(
            "peak memory",
            [f"{n.count(column.peak_memory_mb)} MB" if column.peak_memory_mb else NOT_MEASURED for column in columns],
        )
        return rows

    def without(self) -> str:
        """Words on main tasks that are in no mean and no minimum; none where all are."""
        names = [f"`{name}`" for name in every_task_left_out(self.record)]
        return f", without {_join(names)} (undefined)" if names else ""

    def _milliseconds(self, row: LatencyRecord | None, value: float | None) -> str:
        if value is None and row is not None and row.not_measured is not None:
            return NOT_TIMED
        return self.n.milliseconds(value)

    # ---- tasks and quality ----

    def tasks(self) -> list[list[str]]:
        """What the model answers, and what helped to train it."""
        n = self.n
        rows = [["task", "kind", "answers", "metric", "role", "data", "rows (train / validation / test)"]]
        kept = tasks_of(self.record, self.step)
        for name, task in self.record.tasks.items():
            answers = "a number" if task.labels is None else f"{n.plain(len(task.labels))} labels"
            if task.problem_type == "multi_label_classification":
                answers += ", any number of them"
            counts = " / ".join(
                n.count(task.rows[role]) if role in task.rows else "none" for role in ("train", "validation", "test")
            )
            role = task.role if name in kept else f"{task.role}, dropped"
            rows.append([f"`{name}`", task.kind, answers, task.metric, role, self._data(task), counts])
        return rows

    def _data(self, task: TaskRecord) -> str:
        words = [self.n.text(task.dataset_id) if task.dataset_id else "not named"]
        if task.dataset_revision:
            words.append(f"revision {self.n.text(task.dataset_revision)}")
        if task.license:
            words.append(self.n.text(task.license))
        return ", ".join(words)

    def labels(self) -> dict[str, str]:
        """The label names by task, in order."""
        return {
            name: ", ".join(self.n.code(label) for label in task.labels)
            for name, task in tasks_of(self.record, self.step).items()
            if task.labels
        }

    def quality(self) -> list[list[str]]:
        """Scores per task, against the reference where there is one."""
        n, scores = self.n, self.scores
        if scores is None:
            return []
        role = next(role for role, one in self.artefact.scores.items() if one is scores)
        versus = self.comparison is not None
        header = ["task", "metric", *(["reference"] if versus else []), "this model"]
        header += ["difference", "kept", "kept above chance"] if versus else []
        rows = [[*header, "chance", "rows"]]
        for name, task in self.record.tasks.items():
            if name not in scores.tasks:
                continue
            worst = versus and self.comparison is not None and self.comparison.worst_task == name
            row = [f"**`{name}`**" if worst else f"`{name}`", task.metric]
            value = n.score(scores.tasks[name].metrics.get(task.metric))
            if self.comparison is not None:
                compared = self.comparison.tasks.get(name, {})
                row += [n.score(compared.get("reference")), value, n.difference(compared.get("difference"))]
                undefined = "undefined" if name in self.comparison.undefined else None
                row += [undefined or n.percent(compared.get("retention"))]
                row += [undefined or n.percent(compared.get("retention_above_chance"))]
            else:
                row.append(value)
            rows.append([*row, n.score(task.baseline.get(role)), n.count(scores.tasks[name].rows)])
        return rows

    def other_metrics(self) -> list[list[str]]:
        """Every metric of the delivered model that is not a primary one."""
        rows = [["task", "metric", "this model"]]
        if self.scores is not None:
            rows += [
                [f"`{name}`", metric, self.n.plain(value)]
                for name, score in self.scores.tasks.items()
                for metric, value in score.metrics.items()
                if name in self.record.tasks and metric != self.record.tasks[name].metric
            ]
        return rows if len(rows) > 1 else []

    def all_scores(self) -> list[list[str]]:
        """Primary metrics of every saved form, where there is more than the delivered one."""
        rows = [["step", "form", "precision", "split", "average", *(f"`{name}`" for name in self.record.tasks)]]
        for step, artefact in artefacts_of(self.record):
            scores = final_scores(artefact)
            if scores is not None:
                cells = [
                    marked_name(self.record, step, artefact),
                    artefact.form,
                    self.n.text(artefact.precision),
                    scores.split,
                ]
                rows.append([*cells, self.n.score(scores.average), *task_scores(self.record, step, artefact, self.n)])
        return rows if len(rows) > 2 else []

    # ---- steps ----

    def start(self) -> str | None:
        """The sentence on the pretrained encoder, where its name is known."""
        encoder = self.record.encoder
        name, revision = encoder.get("hub_id") or encoder.get("path_or_id"), encoder.get("revision")
        if not name:
            return None
        return f"Starts from {self.n.text(name)}" + (f", revision {self.n.text(revision)}." if revision else ".")

    def lineage(self) -> str:
        """The steps as a tree."""
        return lineage(self.record)

    def steps(self) -> list[list[str]]:
        """What every step left behind."""
        n = self.n
        rows = [["step", "kind", "from", "layers", "heads a layer", "feed-forward width", "tokens"]]
        rows[0] += ["parameters", "weights"]
        rows[0] += ["validation average", "test average", f"kept{self.without()}", "time"]
        for step in self.record.steps:
            artefact = step.artefacts[0] if step.artefacts else None
            size = artefact.size if artefact else None
            comparison = comparison_of(self.record, artefact) if artefact else None
            scores = artefact.scores if artefact else {}
            validation, test = scores.get("validation"), scores.get("test")
            kept = n.percent(comparison.retention if comparison else None)
            source = parent_of(self.record, step)
            rows.append(
                [
                    f"**`{step.name}`**" if step is self.step else f"`{step.name}`",
                    step.kind,
                    f"`{source.name}`" if source else "encoder",
                    *self._shape(step),
                    n.count(tokens) if (tokens := vocabulary_of(self.record, step)) is not None else NOT_MEASURED,
                    n.parameters(size.parameters if size else None),
                    n.megabytes(size.weights_bytes if size else None),
                    n.score(validation.average if validation else None),
                    n.score(test.average if test else None),
                    "reference" if step.name == self.record.reference else kept,
                    n.duration(step.seconds),
                ]
            )
        return _without_empty_columns(rows)

    def pruning(self) -> list[str]:
        """How steps that did not cut at once came to their size."""
        return pruning_lines(self.record, self.n)

    def vocabulary(self) -> list[str]:
        """What steps that cut the vocabulary left of it."""
        return vocabulary_lines(self.record, self.n)

    def sparsity(self) -> list[str]:
        """What steps that trimmed weights left of them."""
        return sparsity_lines(self.record, self.n)

    def gates(self) -> list[str]:
        """What quantized models had to keep, and kept."""
        return gate_lines(self.record, self.n)

    def sensitivities(self) -> dict[str, dict[str, Any]]:
        """By step that measured what few bits do: its table, and what that shows."""
        return {
            step.name: {
                "table": sensitivity_rows(quantization["sensitivity"], quantization.get("parts"), self.n),
                "words": sensitivity_words(step, self.n),
            }
            for step in sensitive_steps(self.record)
            if (quantization := step.quantization) is not None
        }

    def _shape(self, step: StepRecord) -> list[str]:
        shapes = list(layers_of(step.structure).values())
        if not shapes:
            return [NOT_MEASURED] * 3
        columns = [" + ".join(self.n.plain(len(layers)) for layers in shapes)]
        for role in ("heads", "feed_forward"):
            values = [layer[role] for layers in shapes for layer in layers if layer.get(role) is not None]
            low, high = (min(values), max(values)) if values else (None, None)
            columns.append(self.n.plain(low) if low == high else f"{self.n.plain(low)} to {self.n.plain(high)}")
        return columns

    # ---- interference ----

    def interference(self) -> dict[str, dict[str, Any]]:
        """By step that logged its gradients: its length, table, sentences, and what these are judged by."""
        return {
            step.name: {
                "steps": self.n.count(step.interference["steps"]),
                "table": self._cosines(step.interference),
                "findings": step.interference["findings"],  # Markdown of ours already
                "scope": self.n.text(step.interference["scope"] or "the shared part"),
                "rows": step.interference.get("rows", "train"),  # older records have it of these only
                "judged": self._judged(step.interference["thresholds"]),
            }
            for step in interfering_steps(self.record)
            if step.interference is not None
        }

    def _cosines(self, report: Mapping[str, Any]) -> list[list[str]]:
        n, names = self.n, report["tasks"]
        if len(names) > MATRIX_TASKS:
            rows = [["task", "and", "mean cosine", "in conflict"]]
            for pair in report["pairs"][:MOST_CONFLICTS]:
                cells = [n.cosine(pair["cosine"]), n.percent(pair["conflict"])]
                rows.append([*(f"`{name}`" for name in pair["tasks"]), *cells])
            return rows
        rows = [["", *(f"`{name}`" for name in names), "mean length"]]
        for i, name in enumerate(names):
            cells = []
            for j, cosine in enumerate(report["cosine"][i]):
                known = f"{n.cosine(cosine)} ({n.percent(report['conflict'][i][j])})" if cosine is not None else None
                cells.append("" if i == j else known or "never met")
            rows.append([f"`{name}`", *cells, n.length(report["norms"][name])])
        return rows

    def _judged(self, thresholds: Mapping[str, float]) -> str:
        limits = {name: self.n.plain(value) for name, value in thresholds.items()}
        return (
            f"Tasks are said to pull apart at a mean cosine of {limits['conflict_cosine']} or less, to agree with none "
            f"below {limits['agreement_cosine']} with every other, to be near duplicates from "
            f"{limits['duplicate_cosine']} on; lengths are compared from a ratio of {limits['norm_ratio']} on, a loss "
            f"of {limits['chance_loss']} of an uninformed guess's is nothing learnt, and pairs that met in fewer than "
            f"{limits['few_steps']} steps are not judged."
        )

    def interference_text(self) -> str:
        """The picture of it in words."""
        pairs = [
            f"{step.name}: {' and '.join(pair['tasks'])} {self.n.cosine(pair['cosine'])}"
            for step in interfering_steps(self.record)
            for pair in (step.interference or {})["pairs"][:MOST_CONFLICTS]
        ]
        return "Mean cosines between the tasks' gradients: " + ("; ".join(pairs) or "no two tasks met")

    # ---- size and latency ----

    def latency(self) -> list[list[str]]:
        """Size and time of every saved form that was timed."""
        n, sizes = self.n, batch_sizes(self.record)
        rows = [["step", "form", "precision", "weights"]]
        for size in sizes:
            b = f"batch {n.plain(size)}"
            rows[0] += [f"{b}, minimum", f"{b}, median", f"{b}, times as fast"]
        for step, artefact in artefacts_of(self.record):
            if not artefact.latency:
                continue
            weights = n.megabytes(artefact.size.weights_bytes if artefact.size else None)
            row = [marked_name(self.record, step, artefact), artefact.form, n.text(artefact.precision), weights]
            for size in sizes:
                one = latency_of(artefact, size)
                row.append(self._milliseconds(one, one.minimum_ms if one else None))
                row.append(self._milliseconds(one, one.median_ms if one else None))
                busy = was_busy(artefact, size)
                row.append(NOT_TIMED if busy else n.times_faster(one.ratio_minimum if one else None))
            rows.append(row)
        return rows if len(rows) > 1 else []

    def conditions(self) -> list[list[str]]:
        """The machine and the way of measuring, as they stand in the record."""
        n = self.n
        rows = [["condition", "value"]]
        timed = [row for _, artefact in artefacts_of(self.record) for row in artefact.latency]
        benchmark = self.record.benchmark or {}
        # Already in the tables, or among the limitations.
        shown = {"batch_sizes", "not_measured", "other_processes", "reference", "repetitions", "suspicious", "tokens"}
        for label, values in (
            ("tokens", {row.tokens for row in timed}),
            ("timed calls of each artefact", {row.repetitions for row in timed}),
        ):
            if values:
                rows.append([label, ", ".join(n.plain(value) for value in sorted(values))])
        rows += [[_words(key), n.any(value)] for key, value in benchmark.items() if key not in shown]
        rows += [
            [_words(key), n.any(value)]
            for key, value in self.record.environment.items()
            if key not in ("packages", "python") and key not in benchmark
        ]
        return rows

    def versions(self) -> list[list[str]]:
        """Versions of what the run was made with; packages that were not there are left out."""
        packages = self.record.environment.get("packages")
        found = {"python": self.record.environment.get("python")}
        found |= packages if isinstance(packages, Mapping) else {}
        rows = [[self.n.text(str(name)), self.n.any(version)] for name, version in found.items() if version is not None]
        return [["package", "version"], *rows] if rows else []

    def budget(self) -> list[list[str]]:
        """Limit, finding and verdict for each limit of the budget."""
        rows = [["limit", "allowed", "found", "met"]]
        for name, entry in budget_of(self.record).items():
            met = "yes" if entry["met"] else "**no**"
            if entry["met"] is None:
                met = f"not decided ({self.n.text(entry['why'])})"
            rows.append([_words(name), self.n.plain(entry["limit"]), self.n.plain(entry["found"]), met])
        return rows if len(rows) > 1 else []

    def alternative_text(self) -> str:
        """The picture in words."""
        n = self.n
        points = []
        for step, artefact in artefacts_of(self.record):
            scores, latency = final_scores(artefact), [latency_of(artefact, size) for size in batch_sizes(self.record)]
            if scores is None or scores.average is None:
                continue
            kind = f"{artefact.form}, {n.text(short_precision(artefact))}"
            words = f"{step.name} ({kind}) average {n.score(scores.average)}"
            if latency and latency[0] is not None and latency[0].ratio_minimum:
                words += f" at {n.percent(latency[0].ratio_minimum)} of the reference's time"
            elif latency and latency[0] is not None and latency[0].not_measured is not None:
                words += f", time {NOT_TIMED}"
            points.append(words)
        return ("Quality and time of every saved form: " + "; ".join(points)).replace("[", "(").replace("]", ")")

    # ---- training ----

    def settings(self) -> dict[str, list[list[str]]]:
        """What every step was told and how its training ended."""
        tables = {}
        for step in self.record.steps:
            values = _flatten(step.settings) | {
                f"training: {key}": value for key, value in _flatten(step.training or {}).items()
            }
            rows = [[_words(key), self.n.any(value)] for key, value in values.items() if value is not None]
            if rows:
                tables[inside_html(f"{step.name} ({step.kind})")] = [["setting", "value"], *rows]
        return tables

    def reload_claim(self) -> str | None:
        """The sentence on loading again, where it was tried on everything that is published."""
        results = [artefact.reload for _, artefact in self.use.layout.values()]
        if not results or not all(result and result.get("passed") for result in results):
            return None
        return "Every form above was loaded again in a fresh process and compared with the model before it was saved."


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and all(isinstance(item, Mapping) and "kind" in item for item in value):
            for item in value:
                options = {name: option for name, option in item.items() if name != "kind"}
                flat |= _flatten({item["kind"]: options}, f"{prefix}{key}.")
        elif not (isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)):
            # Lists of rows, such as the log history, are left to the record.
            flat[f"{prefix}{key}"] = value
    return flat


def _without_empty_columns(rows: list[list[str]]) -> list[list[str]]:
    kept = [column for column in range(len(rows[0])) if any(row[column] != NOT_MEASURED for row in rows[1:])]
    return [[row[column] for column in kept] for row in rows]


def _words(key: str) -> str:
    return text(key.replace("_", " "))


def _join(words: Sequence[str]) -> str:
    if not words:
        return ""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
