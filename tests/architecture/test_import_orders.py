"""`import hf_mtcompress` costs next to nothing, and transformers opens our folders whichever comes first.

Each order runs in a process of its own: what one process imported, all later tests in it would find.
"""

import ast
import json
import multiprocessing
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, pipeline

import hf_mtcompress
from hf_mtcompress import MultiTaskModel, SequenceClassification
from hf_mtcompress.data.collator import MultiTaskCollator
from hf_mtcompress.model.anatomy import encoder_of
from hf_mtcompress.model.surgery import cut
from tests import laws
from tests.architecture.spawned import mood_logits
from tests.tiny import FEELING_LABELS, randomize, tiny_config, tiny_encoder, tiny_inputs, tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "datasets", "numpy", "pydantic", "matplotlib", "huggingface_hub", "yaml", "jinja2"}
TEXT = "the fox sleeps"

OPEN = """
import json, sys, torch
folder, inputs = sys.argv[1], {name: torch.tensor(values) for name, values in json.loads(sys.argv[2]).items()}
with torch.no_grad():
    print(json.dumps(AutoModel.from_pretrained(folder)(**inputs)["logits_mood"].tolist()))
"""

ORDERS = {
    "ours first": "import hf_mtcompress; from transformers import AutoModel",
    "transformers first": "from transformers import AutoModel; import hf_mtcompress",
    "transformers first, its classes not yet": "import transformers, hf_mtcompress; AutoModel = transformers.AutoModel",
    # peft asks for `AutoModel` while it is half imported itself: what of ours needs peft cannot be imported then.
    "another library gets the Auto classes": "import hf_mtcompress, peft; from transformers import AutoModel",
    # Ours is imported when `modeling_auto` has imported `configuration_auto`, which has come to its first names.
    "in the middle of the Auto classes": """
import sys
class Early:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.models.auto.auto_mappings":
            import hf_mtcompress
sys.meta_path.insert(0, Early())
from transformers import AutoModel
assert "hf_mtcompress" in sys.modules
""",
    "all names": """
import hf_mtcompress, pydoc
assert not set(hf_mtcompress.__all__) - set(dir(hf_mtcompress))
assert "MultiTaskModel" not in vars(hf_mtcompress)
from hf_mtcompress import *
assert not set(hf_mtcompress.__all__) - set(globals())
assert hf_mtcompress.recipe.load.load_recipe is load_recipe
assert "class MultiTaskModel(" in pydoc.render_doc(hf_mtcompress, renderer=pydoc.plaintext)
from transformers import AutoModel
""",
    "in the workers of a data set": """
import hf_mtcompress
from datasets import Dataset
task = hf_mtcompress.SequenceClassification("mood", text="text", label="label")
def kind(row):
    return {"kind": task.kind, "error": hf_mtcompress.MTCompressError.__name__}  # the latter for the first time
rows = Dataset.from_dict({"row": [0, 1, 2, 3]}).map(kind, num_proc=2)
assert rows[3] == {"row": 3, "kind": "sequence-classification", "error": "MTCompressError"}, rows[3]
from transformers import AutoModel
""",
    "threads": """
import importlib, threading
import hf_mtcompress, transformers
ends = []
def use(name, attribute):
    start.wait()
    ends.append(getattr(importlib.import_module(name), attribute))
names = [("transformers", "AutoModel"), ("transformers", "AutoConfig"), ("hf_mtcompress", "MultiTaskModel"),
         ("hf_mtcompress.model.configuration", "MultiTaskConfig"), ("transformers", "AutoModelForTokenClassification")]
start = threading.Barrier(len(names))
threads = [threading.Thread(target=use, args=name) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(ends) == len(names)
from transformers import AutoModel
""",
}


@dataclass
class Saved:
    """Folders, the inputs they are asked with, and what the models in memory answered."""

    folder: Path
    stock: Path
    inputs: dict[str, torch.Tensor]
    mood: list[list[float]]
    stock_mood: list[list[float]]

    @property
    def arguments(self) -> list[str]:
        """For a program that ends in `OPEN`."""
        return [str(self.folder), json.dumps({name: tensor.tolist() for name, tensor in self.inputs.items()})]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A multi-task folder, and a stock one that is cut unevenly."""
    folder, stock = tmp_path_factory.mktemp("orders") / "tasks", tmp_path_factory.mktemp("orders") / "stock"
    inputs = tiny_inputs("bert")
    tasks = [
        SequenceClassification("mood", labels=FEELING_LABELS),
        SequenceClassification("same", labels=("no", "yes")),
    ]
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    uneven = AutoModelForSequenceClassification.from_config(tiny_config("bert", num_labels=3))
    assert isinstance(uneven, PreTrainedModel)
    randomize(uneven)
    cut(encoder_of(uneven), laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    uneven.save_pretrained(stock)
    with torch.no_grad():
        mood, stock_mood = model(**inputs)["logits_mood"].tolist(), uneven(**inputs).logits.tolist()
    return Saved(folder, stock, inputs, mood, stock_mood)


def fresh(program: str, *arguments: str) -> Any:
    """The last line that a program prints in a process of its own, read as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---- costs ----

MEASURED = """
import json, resource
from pathlib import Path
used, status = resource.getrusage(resource.RUSAGE_SELF), Path("/proc/self/status")
peak = used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
if status.is_file():
    # On Linux `ru_maxrss` starts with the memory of the process that started this one.
    peak = next(int(line.split()[1]) / 2**10 for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
print()
print(json.dumps([used.ru_utime + used.ru_stime, peak, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
RUN = """
import runpy, sys
sys.argv = ["hf-mtcompress", "{}"]
try:
    runpy.run_module("hf_mtcompress", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize(
    "program",
    ["import logging, sys, hf_mtcompress; assert logging.getLogger('torchao').filters", RUN.format("--help")],
    ids=["import", "help"],
)
def test_start_is_cheap(program: str):
    """Who only asks for help, or wants one light name, should not wait seconds for torch.

    Log lines of libraries that nobody here needs are filtered from the start all the same.
    """
    seconds, megabytes, modules = fresh(program + MEASURED)
    assert not HEAVY & set(modules)
    assert seconds < 1
    assert megabytes < 150


def test_version_stands_in_one_place():
    done = subprocess.run(
        [sys.executable, "-m", "hf_mtcompress", "--version"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"hf-mtcompress {hf_mtcompress.__version__}\n"


def test_transformers_pays_for_what_it_opens(saved: Saved):
    """Loading our models, and data sets with them, into every program that uses transformers too would cost seconds."""
    program = """
import sys, json
import hf_mtcompress, transformers
from transformers import PreTrainedConfig
def ours():
    return sorted(name for name in sys.modules if name.startswith("hf_mtcompress.model"))
assert not ours(), ours()
from transformers import AutoConfig, AutoModel
import transformers.pipelines
parts = ("", ".configuration", ".loading", ".marking")
assert ours() == [f"hf_mtcompress.model{part}" for part in parts], ours()
config = AutoConfig.from_pretrained(sys.argv[1])
assert not {"hf_mtcompress.tasks", "hf_mtcompress.formats.pipeline"} & {*sys.modules}
print(json.dumps([type(config).__name__, [task["name"] for task in config.tasks]]))
"""
    assert fresh(program, *saved.arguments) == ["MultiTaskConfig", ["mood", "same"]]


# ---- orders ----


@pytest.mark.parametrize("order", ORDERS)
def test_auto_model_opens_our_folder(order: str, saved: Saved):
    """A class that is not registered when `from_pretrained` looks makes our folders unknown to transformers."""
    assert fresh(ORDERS[order] + OPEN, *saved.arguments) == saved.mood


def test_one_task_and_an_uneven_stock_folder(saved: Saved):
    """Registries of their own: one task of a folder, and shapes that only our quantizer can build."""
    program = """
import hf_mtcompress, json, sys, torch
from transformers import AutoModelForSequenceClassification as Auto
inputs = {name: torch.tensor(values) for name, values in json.loads(sys.argv[2]).items()}
with torch.no_grad():
    models = [Auto.from_pretrained(sys.argv[3]), Auto.from_pretrained(sys.argv[1], task="mood")]
    print(json.dumps([model(**inputs).logits.tolist() for model in models]))
"""
    assert fresh(program, *saved.arguments, str(saved.stock)) == [saved.stock_mood, saved.mood]


def test_pipeline(saved: Saved):
    program = """
import hf_mtcompress, json, sys
from transformers import pipeline
print(json.dumps(pipeline("multi-task", model=sys.argv[1], device="cpu")(sys.argv[2])))
"""
    build: Any = pipeline  # its type lists the tasks of transformers only
    expected = build("multi-task", model=str(saved.folder), device="cpu")(TEXT)
    assert fresh(program, str(saved.folder), TEXT) == expected


def test_unpickled_objects(saved: Saved, tmp_path: Path):
    """A worker may see this package first in what it is sent, from a module that is itself in the middle of imports."""
    model = MultiTaskModel.from_pretrained(saved.folder)
    objects = [MultiTaskCollator(model.tasks, tiny_tokenizer()), model.tasks["mood"], model.config]
    (tmp_path / "objects").write_bytes(pickle.dumps(objects))
    program = """
import pickle, sys
from pathlib import Path
collator, task, config = pickle.loads(Path(sys.argv[3]).read_bytes())
assert task.labels and config.tasks
from transformers import AutoModel
"""
    assert fresh(program + OPEN, *saved.arguments, str(tmp_path / "objects")) == saved.mood


def test_spawned_process(saved: Saved):
    task = SequenceClassification("mood", labels=FEELING_LABELS)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(mood_logits, (task, str(saved.folder), saved.inputs)) == saved.mood


# ---- names ----


def test_names_agree():
    """Three lists: what type checkers read, what is imported on first use, and what `*` gives."""
    tree = ast.parse(Path(hf_mtcompress.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    read = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    places = {name: place.partition(":") for name, place in vars(hf_mtcompress)["_PLACES"].items()}
    assert {name: (f"hf_mtcompress.{module}", called or name) for name, (module, _, called) in places.items()} == read
    assert hf_mtcompress.__all__ == sorted(read)


def test_wrong_name():
    """An error of another kind would break `hasattr`; a guess helps who misspelt a name."""
    with pytest.raises(AttributeError, match="module 'hf_mtcompress' has no attribute 'MultiTaskModl'") as caught:
        getattr(hf_mtcompress, "MultiTaskModl")  # noqa: B009
    assert (caught.value.name, caught.value.obj) == ("MultiTaskModl", hf_mtcompress)
    assert not hasattr(hf_mtcompress, "__main__")
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        exec("from hf_mtcompress import no_such_name")


def test_the_package_itself_is_pickled_by_its_name():
    """`datasets` pickles what a mapped function uses; our modules with all they hold took it ten minutes."""
    data = pickle.dumps(hf_mtcompress)
    assert len(data) < 100
    assert pickle.loads(data) is hf_mtcompress
