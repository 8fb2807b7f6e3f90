"""What a small student keeps of its teacher, by what it imitates; the same optimizer steps for every arm.

Command: python benchmarks/distillation.py --data FOLDER --encoder FOLDER_OR_HUB_ID [--suite text] [--size small]
         [--seeds 3]

text: eleven tasks, the recipe beside this file; small is at most 1,000 training and 500 test rows a task.
vision: two tasks on the same pictures, from a folder with train/CLASS and test/CLASS of CIFAR-10.

For each seed a teacher (the encoder fine-tuned on all tasks), then for each arm a student of `--layers` of its layers.
Rates of students, and which layers those of the vision suite get, were chosen on validation rows of seed 1, where they
were better for plain students and others alike:

  plain            labels alone
  logits           labels and the teacher's answers
  every-task       the same, and its answers to all tasks on the texts of each (text only)
  hidden           labels, answers and its hidden states
  relations        labels, answers and the relations of its queries, keys and values
  two-phase        relations first, without labels, then labels and answers (a third of the steps, then two thirds)
  born-again       labels and the answers of one teacher for each task, each trained alone
  alone            these teachers themselves, one model for each task
  in-one, in-one-annealed: born-again with all layers of the pretrained encoder, trained as the teachers were; annealed
                   goes from their answers to the labels (Clark et al. 2019, "BAM! Born-Again Multi-Task Networks")
  plain-even, every-task-even: rows of small data sets are drawn more often, by the root of their number

Resumable: what is finished keeps its small JSON below benchmarks/results and is not repeated; several processes with
the same command share the work. Teachers and caches of their answers lie in `--work`.
"""

import argparse
import dataclasses
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from multitask_text import FOLDERS, RECIPE
from transformers.utils import logging as transformers_logging

from hf_mtcompress.artifacts import STEP_RECORD, whole_folder, write_text
from hf_mtcompress.data.sources import load_sources, task_of
from hf_mtcompress.locks import share_work
from hf_mtcompress.recipe import Recipe
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.records import StepRecord
from hf_mtcompress.runs.compare.statistics import paired_difference
from hf_mtcompress.runs.run import do_step, prepare_output
from hf_mtcompress.steps.run_context import RunContext, recipe_reader
from hf_mtcompress.steps.scoring import score_folder

HERE = Path(__file__).parent
VISION = HERE / "distillation_vision.yaml"
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
EPOCHS = {"small": 4.0, "full": 3.0}
ANSWERS: list[Any] = ["logits"]


def steps_of(
    arm: str, student: dict[str, Any], epochs: float, cache: Path, alone: dict[str, str], encoder: str
) -> list[dict[str, Any]]:
    """The steps of an arm; the last one makes what is scored."""
    student = {"student": student}
    common = {"teacher": "teacher", "teacher_cache": str(cache), "epochs": epochs}
    # The student starts from the layers of the teacher of all tasks in every arm.
    start = {
        "kind": "pretrain",
        "name": f"start-{arm}",
        "teacher": "teacher",
        **student,
        "max_steps": 1,
        "learning_rate": 1e-12,
    }
    # A step's own arguments stand beside the recipe's.
    even = {"arguments": {"mixing": "temperature"}} if arm.endswith("-even") else {}
    match arm:
        case "plain" | "plain-even":
            return [start, {"kind": "finetune", "name": arm, "epochs": epochs, **even}]
        case "every-task" | "every-task-even":
            step = {"kind": "distill", "name": arm, **common, **student, "criteria": ANSWERS, "every_task": True}
            return [{**step, **even}]
        case "logits" | "hidden" | "relations":
            criteria = ANSWERS if arm == "logits" else [*ANSWERS, arm]
            return [{"kind": "distill", "name": arm, **common, **student, "criteria": criteria}]
        case "two-phase":
            first = {"kind": "pretrain", "name": "general", **common, **student, "epochs": epochs / 3}
            return [first, {"kind": "distill", "name": arm, **common, "epochs": epochs * 2 / 3, "criteria": ANSWERS}]
        case "born-again":
            step = {**common, "kind": "distill", "name": arm, "teachers": alone, "criteria": ANSWERS}
            return [start, {key: value for key, value in step.items() if key != "teacher"}]
        case "in-one" | "in-one-annealed":
            step = {"kind": "distill", "name": arm, "teachers": alone, "criteria": ANSWERS, "epochs": epochs}
            step |= {"teacher_cache": str(cache), "student": {"path": encoder}, "learning_rate": None}
            return [step | ({"label_weight": {"from": 0, "to": 1}} if arm.endswith("-annealed") else {})]
        case _:
            raise ValueError(arm)


def labelled_pictures(source: Path, target: Path) -> Path:
    """The pictures of one folder a class, with both labels in a table beside them."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(target) as scratch:
            for split in ("train", "test"):
                (scratch / split).mkdir()
                rows = []
                for number, picture in enumerate(sorted((source / split).glob("*/*.jpg"))):
                    name, folder = f"{number}.jpg", picture.parent.name
                    (scratch / split / name).symlink_to(picture.resolve())
                    rows.append(
                        {"file_name": name, "class": folder, "kind": "animal" if folder in ANIMALS else "vehicle"}
                    )
                table = "".join(json.dumps(row) + "\n" for row in rows)
                (scratch / split / "metadata.jsonl").write_text(table, encoding="utf-8")
    return target


BORN_AGAIN = ("born-again", "alone", "in-one", "in-one-annealed")
"""Arms that need a teacher of its own for each task."""
LAYERS = {"text": 3, "vision": 6}
ARMS = (
    "plain",
    "logits",
    "every-task",
    "hidden",
    "relations",
    "two-phase",
    "born-again",
    "alone",
    "in-one",
    "in-one-annealed",
    "plain-even",
    "every-task-even",
)
STUDENT_RATES = {"text": 3e-4, "vision": 3e-5}
"""Learning rate of the encoder of students."""
CHOOSE = {"text": "spaced", "vision": "first"}
"""Which layers of the teacher a student has."""
DEFAULTS: dict[str, Any] = {
    "suite": "text",
    "size": "small",
    "layers": None,
    "choose": None,
    "student_rate": None,
    "epochs": None,
    "overrides": [],
}


class Benchmark:
    """One size of the suite, with its folders.

    Args:
        options: `data`, `encoder` and `work`; anything else that `main` reads has a default.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options = argparse.Namespace(**{**DEFAULTS, **vars(options)})
        options.layers = options.layers or LAYERS[options.suite]
        options.choose = options.choose or CHOOSE[options.suite]
        options.student_rate = options.student_rate or STUDENT_RATES[options.suite]
        name = f"distillation_text_{options.size}" if options.suite == "text" else "distillation_vision"
        # Teachers and their answers serve students of any depth.
        self.work = options.work / name
        if options.layers != LAYERS[options.suite]:
            name = f"{name}_{options.layers}_layers"
        if options.choose != CHOOSE[options.suite]:
            name = f"{name}_{options.choose}"
        self.results = HERE / "results" / name
        self.epochs = options.epochs or EPOCHS[options.size]
        self.recipe = RECIPE if options.suite == "text" else VISION
        if options.suite == "text":
            self.overrides = [f"tasks.{task}.data.data_dir={options.data / folder}" for task, folder in FOLDERS.items()]
            if options.size == "full":
                self.overrides += [f"tasks.{task}.data.max_rows=null" for task in FOLDERS]
        else:
            self.overrides = [f"tasks.class.data.data_dir={labelled_pictures(options.data, self.work / 'pictures')}"]
        self.overrides += [f"encoder.path={options.encoder}", "training.bf16=true", *options.overrides]
        base = load_recipe(self.recipe, self.overrides)
        self.sources = load_sources(base.tasks, base.seed)
        self.reader = recipe_reader(base)

    def run(self) -> None:
        """Everything that is not done yet."""
        for seed in range(1, self.options.seeds + 1):
            prepare_output(self.work / f"seed-{seed}")
        teachers = [("teacher", seed) for seed in range(1, self.options.seeds + 1)]
        arms = [(arm, seed) for _, seed in teachers for arm in self.options.arms]
        alone = [(f"alone-{task}", seed) for _, seed in teachers for task in self.sources.tasks]
        for jobs, work in (
            (teachers, self.one),
            (alone if set(BORN_AGAIN) & set(self.options.arms) else [], self.alone),
            (arms, self.one),
        ):
            share_work(work, jobs, [self.work / f"{arm}-{seed}.lock" for arm, seed in jobs])

    def alone(self, job: tuple[str, int]) -> None:
        """Train the teacher of one task, unless the arms that need it are done."""
        name, seed = job
        task = name.removeprefix("alone-")
        wanted = [arm for arm in BORN_AGAIN if arm in self.options.arms]
        if all((self.results / arm / f"seed-{seed}.json").exists() for arm in wanted):
            return
        recipe, context = self.of_one_task(task, seed)
        do_step(recipe.steps[0], {}, context)

    def of_one_task(self, task: str, seed: int) -> tuple[Recipe, RunContext]:
        """The recipe of the teacher of one task, and its rows."""
        step = {"kind": "finetune", "name": f"alone-{task}", "epochs": self.epochs}
        recipe = load_recipe(self.recipe, [*self.overrides, f"steps={json.dumps([step])}"])
        own = dataclasses.replace(recipe.tasks[task], data=self.sources.configs[task])
        recipe = dataclasses.replace(recipe, seed=seed, tasks={task: own})
        labels = self.sources.tasks[task].labels
        sources = dataclasses.replace(
            self.sources.of([task]), tasks={task: dataclasses.replace(task_of(task, own), labels=labels)}
        )
        return recipe, RunContext(recipe, self.work / f"seed-{seed}", sources, self.reader)

    def teachers_scored(self, seed: int) -> dict[str, Any]:
        """What the teachers of one task each reach, as the facts of an arm."""
        scores: dict[str, Any] = {"test": {}, "validation": {}}
        records, rows, rate = [], {}, None
        for task in self.sources.tasks:
            recipe, context = self.of_one_task(task, seed)
            records.append(do_step(recipe.steps[0], {}, context))
            found = {
                "test": score_folder(context, context.step_folder(f"alone-{task}"), "test"),
                "validation": records[-1].artefacts[0].scores["validation"],
            }
            for split, score in found.items():
                scores[split][task] = score.tasks[task].metrics[str(self.sources.tasks[task].metric)]
            rows[task], rate = found["test"].tasks[task].rows, recipe.training.learning_rate
        return {
            "optimizer_steps": sum((record.training or {})["steps"] for record in records),
            "seconds": sum(record.seconds for record in records),
            "average": sum(scores["test"].values()) / len(rows),
            "validation_average": sum(scores["validation"].values()) / len(rows),
            "learning_rate": rate,
            "scores": scores["test"],
            "rows": rows,
        }

    def one(self, job: tuple[str, int]) -> None:
        """Train and score one arm in one seed."""
        arm, seed = job
        target = self.results / arm / f"seed-{seed}.json"
        folder = self.work / f"seed-{seed}"
        if target.exists() and (arm != "teacher" or (folder / "teacher" / STEP_RECORD).exists()):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if arm == "alone":
            write_text(target, json.dumps({"arm": arm, "seed": seed, **self.teachers_scored(seed)}, indent=2) + "\n")
            return
        teacher = {"kind": "finetune", "name": "teacher", "epochs": self.epochs}
        alone = {task: str(folder / f"alone-{task}") for task in self.sources.tasks}
        cache = self.work / "cache"
        student = {"layers": self.options.layers, "choose": self.options.choose}
        steps = [] if arm == "teacher" else steps_of(arm, student, self.epochs, cache, alone, self.options.encoder)
        # The step that only copies layers keeps its rate of nothing.
        steps = [{"learning_rate": self.options.student_rate, **step} for step in steps]
        recipe = load_recipe(self.recipe, [*self.overrides, f"steps={json.dumps([teacher, *steps])}"])
        # Rows are drawn with the recipe's own seed and are the same for all; this one is of training.
        recipe = dataclasses.replace(recipe, seed=seed)
        context = RunContext(recipe, folder, self.sources, self.reader)
        done: dict[str, StepRecord] = {}
        for step in recipe.steps:
            done[str(step.name)] = do_step(step, done, context)
        last = str(recipe.steps[-1].name)
        cut = bool(steps) and not arm.startswith("in-one")
        scores = score_folder(context, folder / last, "test")
        facts = {
            "arm": arm,
            "seed": seed,
            "layers": self.options.layers if cut else None,
            "choose": self.options.choose if cut else None,
            "optimizer_steps": sum(
                (done[str(step.name)].training or {})["steps"]
                for step in recipe.steps[bool(steps) :]
                if not str(step.name).startswith("start-")
            ),
            "seconds": sum(done[str(step.name)].seconds for step in recipe.steps[bool(steps) :]),
            "teacher_cache": [
                (done[str(step.name)].training or {}).get("teacher_cache") for step in recipe.steps[bool(steps) :]
            ],
            "average": scores.average,
            "validation_average": done[last].artefacts[0].scores["validation"].average,
            "learning_rate": recipe.steps[-1].learning_rate or recipe.training.learning_rate,
            "scores": {
                name: found.metrics[str(self.sources.tasks[name].metric)] for name, found in scores.tasks.items()
            },
            "rows": {name: found.rows for name, found in scores.tasks.items()},
        }
        write_text(target, json.dumps(facts, indent=2) + "\n")
        for step in recipe.steps[bool(steps) :] if arm != "teacher" else ():
            shutil.rmtree(folder / str(step.name))

    def table(self) -> str:
        """What every arm keeps, and its difference from `plain` over seeds."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for file in sorted(self.results.glob("*/seed-*.json")):
            facts = json.loads(file.read_text(encoding="utf-8"))
            found.setdefault(facts["arm"], {})[facts["seed"]] = facts
        lines = [
            "| arm | seeds | average | kept | kept, worst task | against plain | against alone | seconds |",
            "| --- |" + " ---: |" * 7,
        ]
        for arm, seeds in found.items():
            shared = [seed for seed in seeds if seed in found.get("teacher", {})]
            kept = [_retention(seeds[seed]["scores"], found["teacher"][seed]["scores"]) for seed in shared]
            against = [
                "-" if arm == "teacher" and other == "plain" else _against(seeds, found.get(other, {}))
                for other in ("plain", "alone")
            ]
            average = sum(facts["average"] for facts in seeds.values()) / len(seeds)
            seconds = sum(facts["seconds"] for facts in seeds.values()) / len(seeds)
            mean = sum(share for share, _ in kept) / len(kept) if kept else float("nan")
            worst = min((share for _, share in kept), default=float("nan"))
            lines.append(
                f"| {arm} | {len(seeds)} | {average:.4f} | {100 * mean:.1f} % | {100 * worst:.1f} % | "
                f"{' | '.join(against)} | "
                f"{seconds:.0f} |"
            )
        return "\n".join(lines)


def _against(seeds: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]]) -> str:
    """Difference of averages in points over the seeds that both have, with its interval."""
    both = [seed for seed in seeds if seed in others]
    if len(both) < 2 or seeds is others:
        return "-"
    difference = paired_difference(
        [seeds[seed]["average"] for seed in both], [others[seed]["average"] for seed in both]
    )
    low, high = difference.low or 0.0, difference.high or 0.0
    return f"{100 * difference.mean:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def _retention(student: dict[str, float], teacher: dict[str, float]) -> tuple[float, float]:
    shares = [student[name] / teacher[name] for name in teacher]
    return sum(shares) / len(shares), min(shares)


def main() -> int:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--encoder", required=True, help="folder or Hub id of the pretrained encoder")
    parser.add_argument("--suite", choices=tuple(LAYERS), default="text")
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="of the student; default: half of the encoder's")
    parser.add_argument("--choose", help="which layers; see the recipe's `student`")
    parser.add_argument("--student-rate", type=float, help="learning rate of students' encoders")
    parser.add_argument("--epochs", type=float, help="default: 4 of the small size, 3 of the full one")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--work", type=Path, default=Path("runs"), help="for teachers and caches (default: runs)")
    parser.add_argument("overrides", metavar="a.b.c=value", nargs="*", help="change a value of the recipe")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()
    benchmark = Benchmark(options)
    benchmark.run()
    print(benchmark.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
