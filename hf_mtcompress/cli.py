"""The command line: `hf-mtcompress VERB ...`. Data on stdout, talk on stderr, exit code 2 after a user's mistake."""

import argparse
import dataclasses
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mtcompress import __version__
from hf_mtcompress.errors import MTCompressError, RecipeError

if TYPE_CHECKING:  # slow to import
    from hf_mtcompress.recipe import Recipe

USER_ERROR = 2
_MOST = 10**9
"""Of any number on the command line."""

_SHOWN_PAIRS = 5
"""Of tasks that agree, and of those that pull apart."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = _parser()
    # argparse ends a list of positionals at the first option: overrides after --output come back as the rest.
    options, rest = parser.parse_known_args(arguments)
    wrong = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        options.overrides += rest
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    try:
        # Trainer and progress bars write to stdout; that is for data here.
        with redirect_stdout(sys.stderr):
            answer = options.command(options)
        print(answer)
    except MTCompressError as error:
        print(f"hf-mtcompress {options.verb}: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        # What the verbs know of is told by them; this is a folder that cannot be read, a file where one was expected.
        logging.getLogger(__name__).info("", exc_info=error)
        where = f" at {error.filename}" if error.filename else ""
        print(
            f"hf-mtcompress {options.verb}: expected files that can be read and written, found "
            f"{error.strerror or error}{where}; check the paths and their permissions",
            file=sys.stderr,
        )
        return USER_ERROR
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-mtcompress",
        description="Train one small checkpoint that does several tasks, and prove it.",
        epilog="Overrides look like steps.teacher.epochs=1 or encoder.path=my/encoder.",
    )
    parser.add_argument("--version", action="version", version=f"hf-mtcompress {__version__}")
    parser.add_argument("--verbose", action="store_true", help="say more on stderr")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, help_text: str, command: Any) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help_text, description=help_text)
        sub.set_defaults(command=command)
        return sub

    def with_recipe(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("recipe", metavar="RECIPE", type=Path, help="a YAML file")
        sub.add_argument("overrides", metavar="a.b.c=value", nargs="*", help="change a value of the recipe")

    recipes = verb("recipes", "list the recipes that come with the package, or copy one to change it", _recipes)
    recipes.add_argument("--copy", metavar=("NAME", "DIR"), nargs=2, help="copy a recipe into a folder")
    run = verb("run", "do all steps of a recipe and measure what comes out", _run)
    with_recipe(run)
    run.add_argument("--output", metavar="DIR", type=Path, help="folder of the run (default: runs/NAME)")
    validate = verb("validate", "check a recipe and its data; show all mistakes", _validate)
    with_recipe(validate)
    plan = verb("plan", "say what a run would do, with estimated sizes", _plan)
    with_recipe(plan)
    plan.add_argument("--output", metavar="DIR", type=Path, help="folder of the run (default: runs/NAME)")
    plan.add_argument("--json", action="store_true", help="as JSON")

    compare = verb(
        "compare-tasks", "train each task alone and all together, over seeds; show who is hurt", _compare_tasks
    )
    with_recipe(compare)
    compare.add_argument("--seeds", type=int, default=3, help="trainings of each arm (default: 3)")
    compare.add_argument("--output", metavar="DIR", type=Path, help="folder (default: runs/NAME-compare)")
    compare.add_argument(
        "--arm",
        metavar="NAME=a.b.c=value[,...]",
        action="append",
        default=[],
        help="all tasks together with a changed recipe, such as product=fusion.kind=product; repeatable",
    )
    compare.add_argument(
        "--group",
        metavar="NAME=task+task/task[,a.b.c=value]",
        action="append",
        default=[],
        help="several models with some of the tasks each, from a changed recipe if settings follow; repeatable",
    )
    compare.add_argument(
        "--encoders",
        type=_at_least(1),
        help="add the arm 'grouped': tasks that lose much by sharing, on validation rows, get another encoder, up to "
        "so many in all",
    )
    compare.add_argument("--keep-models", action="store_true", help="keep the weights after scoring")
    compare.add_argument("--json", action="store_true", help="as JSON")

    search = verb("search", "find the smallest checkpoint within the recipe's budget", _search)
    with_recipe(search)
    search.add_argument("--output", metavar="DIR", type=Path, help="folder of the run (default: runs/NAME)")
    search.add_argument("--json", action="store_true", help="as JSON")

    ask = verb("ask-teacher", "fill the cache of a step's teacher, or a part of it, before the step runs", _ask_teacher)
    with_recipe(ask)
    ask.add_argument("--step", required=True, help="a distill or pretrain step with teacher_cache")
    ask.add_argument("--part", default="1/1", metavar="N/OF", help="such as 2/4, on machines without a common folder")
    ask.add_argument("--output", metavar="DIR", type=Path, help="folder of the run (default: runs/NAME)")

    group = verb(
        "group-tasks", "say which tasks should share an encoder, from gradients of a trained model", _group_tasks
    )
    group.add_argument(
        "run", metavar="RUN", type=Path, help="folder of a run, with its data where its recipe finds them"
    )
    group.add_argument("--encoders", type=_at_least(1), help="at most so many (default: 2)")
    group.add_argument(
        "--rows", type=_at_least(1), default=200, help="validation rows of each source, at most (default: 200)"
    )
    group.add_argument("--parameters", type=_at_least(1), help="at most so many in all encoders, instead of --encoders")
    group.add_argument("--json", action="store_true", help="as JSON")

    evaluate = verb("evaluate", "score a saved model on the data of a recipe", _evaluate)
    evaluate.add_argument("folder", metavar="FOLDER", type=Path, help="a step's folder, of any form")
    with_recipe(evaluate)
    evaluate.add_argument("--split", choices=("validation", "test"), default="validation")

    bench = verb("bench", "time saved models side by side, the first one being the reference", _bench)
    bench.add_argument("folders", metavar="FOLDER", type=Path, nargs="+")
    bench.add_argument("--tokens", type=_at_least(1), default=64, help="length of every row (default: 64)")
    bench.add_argument("--batch-sizes", type=_at_least(1), nargs="+", default=[1, 32])
    bench.add_argument("--repetitions", type=_at_least(1), default=20)
    bench.add_argument("--threads", type=_at_least(1), help="default: all cores that other processes leave")
    bench.add_argument(
        "--wait", type=_at_least(0), default=30, metavar="SECONDS", help="for a quiet machine, at most (default: 30)"
    )
    bench.add_argument("--json", action="store_true", help="as JSON")

    report = verb("report", "show the figures of a run", _report)
    report.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    report.add_argument("--json", action="store_true", help="a list with one object for each step")
    card = verb("card", "write the model card of a run again, from its record", _card)
    card.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    webpage = verb("webpage", "write a page that runs the model inside the browser", _webpage)
    webpage.add_argument(
        "folder", metavar="RUN", type=Path, help="folder of a run, an ONNX folder, or a page that was written"
    )
    webpage.add_argument("--step", help="of the run; default: the delivered one, else the last with an ONNX graph")
    webpage.add_argument("--output", metavar="DIR", type=Path, help="default: RUN/webpage, or beside an ONNX folder")
    webpage.add_argument("--title", help="default: the run's name")
    webpage.add_argument("--example", metavar="TEXT", action="append", default=[], help="a text to try; repeatable")
    webpage.add_argument(
        "--libraries", metavar="DIR", type=Path, help="folder with node_modules, where npm cannot fetch them"
    )
    webpage.add_argument("--serve", metavar="PORT", type=_port, help="then serve it on this machine until Ctrl-C")
    push = verb("push", "upload a run to the Hub, private unless told otherwise", _push)
    push.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    push.add_argument("--repo-id", help="OWNER/NAME (default: publish.repo_id of the recipe)")
    push.add_argument("--public", action="store_true", help="make a new repository public")
    push.add_argument("--dry-run", action="store_true", help="list the files and show the card, upload nothing")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    """A whole number of an option."""

    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= _MOST:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {_MOST}, found '{text[:20]}'")
        return int(text)

    return read


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 (any free one) to 65535, found '{text}'")
    return int(text)


# Imported late: hf_mtcompress - torch and transformers take seconds; --help and a misspelt option should not wait.


def _recipe(options: argparse.Namespace) -> "Recipe":
    from hf_mtcompress.recipe.load import load_recipe

    return load_recipe(options.recipe, options.overrides)


def _output(options: argparse.Namespace, recipe: "Recipe") -> Path:
    return (options.output or Path("runs") / recipe.name).absolute()


def _recipes(options: argparse.Namespace) -> str:
    from hf_mtcompress.recipe.examples import copy_example, example_recipes, headline

    if options.copy is not None:
        name, folder = options.copy
        return f"{copy_example(name, Path(folder))}\nWhat it needs stands at its head."
    found = example_recipes()
    width = max(map(len, found))
    return "\n".join(f"{name:<{width}}  {headline(path)}" for name, path in found.items())


def _run(options: argparse.Namespace) -> str:
    recipe = _recipe(options)
    from hf_mtcompress.publishing.report import report_table
    from hf_mtcompress.runs.run import run

    output = _output(options, recipe)
    record = run(recipe, output)
    return f"{report_table(record)}\n\nCard, record and models: {output}"


def _validate(options: argparse.Namespace) -> str:
    recipe = _recipe(options)
    from hf_mtcompress.runs.commands import validate

    validate(recipe)
    return f"{options.recipe}: {len(recipe.tasks)} tasks, {len(recipe.steps)} steps, no problems"


def _plan(options: argparse.Namespace) -> str:
    recipe = _recipe(options)
    from hf_mtcompress.runs.commands import plan
    from hf_mtcompress.runs.plan import plan_text

    planned = plan(recipe)
    return json.dumps(planned, indent=2) if options.json else plan_text(planned, _output(options, recipe))


def _compare_tasks(options: argparse.Namespace) -> str:
    from hf_mtcompress.publishing.task_comparison import comparison_table
    from hf_mtcompress.records import to_json
    from hf_mtcompress.runs.compare.arms import load_comparison
    from hf_mtcompress.runs.compare.compare import compare_tasks

    comparison = load_comparison(
        options.recipe,
        options.overrides,
        seeds=options.seeds,
        arms=options.arm,
        groups=options.group,
        encoders=options.encoders,
    )
    output = (options.output or Path("runs") / f"{comparison.recipe.name}-compare").absolute()
    record = compare_tasks(comparison, output, keep_models=options.keep_models)
    return to_json(record) if options.json else f"{comparison_table(record)}\nRecord and picture: {output}"


def _search(options: argparse.Namespace) -> str:
    from hf_mtcompress.publishing.family import family_table
    from hf_mtcompress.records import to_json
    from hf_mtcompress.runs.search import search

    recipe = _recipe(options)
    record = search(recipe, _output(options, recipe))
    return to_json(record).rstrip() if options.json else family_table(record).rstrip()


def _ask_teacher(options: argparse.Namespace) -> str:
    recipe = _recipe(options)
    found = re.fullmatch(r"(\d+)/(\d+)", options.part)
    number, of = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= of:
        raise RecipeError(f"--part: expected N/OF such as 2/4, found '{options.part}'")
    from hf_mtcompress.runs.commands import ask_teacher

    there, wanted = ask_teacher(recipe, _output(options, recipe), options.step, (number - 1, of))
    return f"{there} of {wanted} files of answers are there"


def _group_tasks(options: argparse.Namespace) -> str:
    from hf_mtcompress.runs.grouping import group_tasks_of

    grouping = group_tasks_of(options.run, encoders=options.encoders, parameters=options.parameters, rows=options.rows)
    if options.json:
        return json.dumps(dataclasses.asdict(grouping), indent=2)
    lines = [f"{name}: {affinity:+.3f}" for name, affinity in grouping.affinity.items()]
    pairs = [(cosine, f"{one} + {two}: {cosine:+.3f}") for cosine, one, two in grouping.pairs()]
    close = [line for cosine, line in pairs if cosine > 0][:_SHOWN_PAIRS]
    apart = [line for cosine, line in reversed(pairs) if cosine < 0][:_SHOWN_PAIRS]
    return "\n".join(
        [
            f"{len(grouping.groups)} encoders, expected affinity {grouping.expected:+.3f}"
            + ("" if grouping.exact else " (searched, not all groupings tried)"),
            *(f"  {' + '.join(group)}" for group in grouping.groups),
            *([f"  in each: {', '.join(grouping.helpers)} (auxiliary)"] if grouping.helpers else []),
            "mean affinity of a task's companions to it:",
            *(f"  {line}" for line in lines),
            *(["cosines of pairs that agree most:", *(f"  {line}" for line in close)] if close else []),
            *(["of pairs that pull apart most:", *(f"  {line}" for line in apart)] if apart else []),
            f"from {grouping.looks} looks at gradients on validation rows"
            if grouping.looks > 1
            else "from one look, which is mostly chance: train the first 500 steps with fusion.measure_every=25 "
            "fusion.measure_on=validation",
            f"to see what it brings: hf-mtcompress compare-tasks RECIPE --group by-gradients={grouping.text}",
        ]
    )


def _evaluate(options: argparse.Namespace) -> str:
    recipe = _recipe(options)
    from hf_mtcompress.runs.commands import evaluate

    return json.dumps(dataclasses.asdict(evaluate(options.folder, recipe, options.split)), indent=2)


def _bench(options: argparse.Namespace) -> str:
    from hf_mtcompress.publishing.figures import NOT_TIMED
    from hf_mtcompress.recipe import BenchmarkConfig
    from hf_mtcompress.runs.commands import bench

    config = BenchmarkConfig(
        tokens=options.tokens,
        batch_sizes=tuple(options.batch_sizes),
        repetitions=options.repetitions,
        threads=options.threads,
        wait=options.wait,
    )
    result = bench(options.folders, config)
    if options.json:
        return json.dumps(result, indent=2)
    lines = [f"{'artefact':<32}{'batch':>6}{'min ms':>10}{'median ms':>11}{'ratio':>8}"]
    for label, rows in result["latency"].items():
        for row in rows:
            times = [row["minimum_ms"], row["median_ms"]]
            figures = "" if times[0] is None else f"{times[0]:>10.2f}{times[1]:>11.2f}"
            ratio = row["ratio_minimum"]
            figures += f"  {NOT_TIMED}" if ratio is None else f"{ratio:>8.3f}"
            lines.append(f"{label:<32}{row['batch_size']:>6}{figures}")
    lines += [f"{NOT_TIMED}: {reason}" for reason in result["conditions"]["not_measured"]]
    return "\n".join(lines)


def _report(options: argparse.Namespace) -> str:
    from hf_mtcompress.publishing.report import report_rows, report_table
    from hf_mtcompress.runs.results import load_record, told_from

    record = load_record(options.run)
    with told_from(options.run):
        return json.dumps(report_rows(record), indent=2) if options.json else report_table(record)


def _card(options: argparse.Namespace) -> str:
    from hf_mtcompress.runs.commands import card

    return str(card(options.run))


def _webpage(options: argparse.Namespace) -> str:
    from hf_mtcompress.formats.web.page import PAGE, serve_webpage
    from hf_mtcompress.runs.commands import webpage

    page = options.folder
    if options.serve is None or not (page / PAGE).is_file():
        page = webpage(
            options.folder,
            options.output,
            step=options.step,
            title=options.title,
            examples=options.example,
            libraries=options.libraries,
        )
    if options.serve is None:
        return f"{page}\nto look at it: hf-mtcompress webpage {page} --serve 8000, or any web server"
    with serve_webpage(page, options.serve) as server, suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", file=sys.stderr)
        server.serve_forever()
    return str(page)


def _push(options: argparse.Namespace) -> str:
    from hf_mtcompress.runs.commands import push

    return "\n".join(push(options.run, options.repo_id, public=options.public, dry_run=options.dry_run))
