"""What a record itself gives reason to warn of."""

from hf_mtcompress.publishing.facts import (
    ancestors,
    artefacts_of,
    comparison_of,
    delivered_artefact,
    delivered_step,
    depends_on_company,
    final_scores,
    is_vanilla_shape,
    not_timed,
    reference_artefact,
    tasks_of,
)
from hf_mtcompress.publishing.figures import NOT_TIMED, Figures
from hf_mtcompress.publishing.repository import repository_layout
from hf_mtcompress.records import FORMS, RunRecord

FEW_ROWS = 500
"""Below this many test rows a task's score is called uncertain in the card."""


class Limitations:
    """The section of the card on limits.

    Args:
        record: what happened.
        figures: prints its numbers and texts.
    """

    def __init__(self, record: RunRecord, figures: Figures) -> None:
        self.record = record
        self.n = figures
        self.step = delivered_step(record)
        self.artefact = delivered_artefact(record)
        reference = reference_artefact(record)
        is_reference = reference is not None and reference.folder == self.artefact.folder
        self.comparison = None if is_reference else comparison_of(record, self.artefact)
        self.scores = final_scores(self.artefact)
        self.layout = repository_layout(record)

    def facts(self) -> list[str]:
        """What the record itself gives reason to warn of."""
        record, n = self.record, self.n
        facts = []
        if record.encoder.get("max_length"):
            facts.append(f"Inputs longer than {n.plain(record.encoder['max_length'])} tokens are cut.")
        if not (record.publish or {}).get("language"):
            facts.append("The language of the training data is not stated in the record.")
        facts += self._quality_limits()
        facts.append(
            f"Everything is from one run with one seed ({n.plain(record.seed)}); other seeds give other scores."
        )
        if any(artefact.latency for _, artefact in artefacts_of(self.record)):
            facts.append(
                "Times are from one machine, named above; the ratios are likelier to carry over than the times."
            )
        if reasons := not_timed(record):
            facts.append(f"Times that are not given: {NOT_TIMED} ({'; '.join(map(n.text, reasons))}).")
        pruned = [step for step in ancestors(record, self.step) if not is_vanilla_shape(record, step)]
        if pruned and "torch" in {artefact.form for _, artefact in self.layout.values()}:
            facts.append(
                "Heads or neurons were removed unevenly: the PyTorch form needs hf_mtcompress to be rebuilt, "
                "transformers alone cannot."
            )
        form = FORMS[self.artefact.form]
        if form.layout == "graph":
            name = form.runtime.removesuffix(" Runtime")
            facts.append(f"The {name} form runs through {form.runtime} and is not opened by the `Auto` classes.")
        moving = [f"`{step.name}`" for step, artefact in self.layout.values() if depends_on_company(artefact)]
        if moving:
            facts.append(
                f"In {', '.join(moving)} the ranges of rounded activations are those of a whole call, so an answer can "
                "change with the rows beside it (of many texts a few labels near a border do). Calibrated ranges "
                "(`calibration`) and OpenVINO do not have that."
            )
        if self.artefact.form == "bitsandbytes":
            facts.append("bitsandbytes saves memory; on a processor without a GPU it is usually slower than float32.")
        facts += self._reload_limits()
        restricted = [
            f"`{name}` ({n.text(task.license)})"
            for name, task in record.tasks.items()
            if task.license and "nc" in task.license.lower()
        ]
        if restricted:
            facts.append(f"Trained on data whose licence excludes commercial use: {', '.join(restricted)}.")
        return facts

    def _quality_limits(self) -> list[str]:
        n, facts, scores, comparison = self.n, [], self.scores, self.comparison
        tasks = tasks_of(self.record, self.step)
        if scores is None:
            return ["The delivered form was not scored; see the steps it was made from."]
        if scores.split != "test" and "test" not in self.artefact.scores:
            facts.append(
                "There was no test split: the scores are from the validation split that decisions were made on."
            )
        if comparison is not None and comparison.worst_task is not None and comparison.worst_task_retention is not None:
            facts.append(
                f"Compression cost `{comparison.worst_task}` most: it keeps "
                f"{n.percent(comparison.worst_task_retention)} of the reference's score."
            )
        if comparison is not None:
            facts += [
                f"`{name}`: what is kept is undefined, because {n.text(why)}."
                for name, why in comparison.undefined.items()
                if name in tasks
            ]
        few = [f"`{name}` ({n.count(score.rows)})" for name, score in scores.tasks.items() if score.rows < FEW_ROWS]
        if few:
            facts.append(f"Few rows were scored, so small differences mean little: {', '.join(few)}.")
        missing = [f"`{name}`" for name in tasks if name not in scores.tasks]
        if missing:
            facts.append(f"Not scored: {', '.join(missing)}.")
        auxiliary = [f"`{name}`" for name, task in tasks.items() if task.role == "auxiliary"]
        if auxiliary:
            facts.append(f"Trained as a help to the others and not counted in averages: {', '.join(auxiliary)}.")
        dropped = [f"`{name}`" for name in self.record.tasks if name not in tasks]
        if dropped:
            facts.append(f"Helped in the training and are not answered by this model: {', '.join(dropped)}.")
        return facts

    def _reload_limits(self) -> list[str]:
        n, facts = self.n, []
        for step, artefact in self.layout.values():
            result = artefact.reload or {}
            difference = result.get("max_difference")
            if result.get("passed") is False:
                facts.append(f"`{step.name}` ({artefact.form}) did not give the same outputs after loading again.")
            elif isinstance(difference, int | float) and difference > 0:
                facts.append(
                    f"`{step.name}` ({artefact.form}): outputs after loading differ by up to {n.plain(difference)}."
                )
        return facts
