"""The forms that a model is saved in, as plain data: how each is told apart, what it needs, how it is opened.

`formats` opens and writes them; card, report, picture and push read them here.
"""

from dataclasses import dataclass
from typing import Literal

FormName = Literal["torch", "bitsandbytes", "torchao", "vanilla", "onnx", "openvino"]


@dataclass(frozen=True, kw_only=True)
class Form:
    """One saved form.

    Attributes:
        name: as in a record; the folder of this form in an export step and in a repository is called so, too.
        layout: `model` for one folder with the weights of all tasks, `tasks` for one such folder for each task,
            `graph` for one graph of all tasks with settings beside it.
        files: by which a folder is known, and without which it does not open: the settings first, then the graph.
        extra: the extra of this package that opening it takes.
        extras_to_write: the extras that writing it takes.
        backend: of the quantize step that writes it in fewer bits.
        runtime: what runs it, in words.
        opens_with: how it is opened, in Markdown.
    """

    name: FormName
    layout: Literal["model", "tasks", "graph"]
    files: tuple[str, ...]
    extra: str | None = None
    extras_to_write: tuple[str, ...] = ()
    backend: str | None = None
    runtime: str = "PyTorch"
    opens_with: str

    @property
    def settings(self) -> str:
        """The file with what the weights need to be used."""
        return self.files[0]

    @property
    def graph(self) -> tuple[str, ...]:
        """The files of the graph; none for forms that are not one."""
        return self.files[1:]

    @property
    def in_few_bits(self) -> bool:
        """Whether PyTorch holds the weights in fewer bits than float32, by a package of its own."""
        return self.layout == "model" and self.extra is not None


CONFIG = "config.json"
"""The settings of every folder that PyTorch opens."""
ONNX_MODEL = "model.onnx"
"""The graph of all heads, weights inside (external data does not load in a browser)."""
ONNX_SETTINGS = "mtcompress_onnx.json"
"""What a graph needs to be used without the model: inputs, tasks, preprocessing, quantization."""
OPENVINO_MODEL = "model.xml"
"""The same for OpenVINO; the weights lie beside it."""
OPENVINO_WEIGHTS = "model.bin"
OPENVINO_SETTINGS = "mtcompress_openvino.json"

FORMS: dict[FormName, Form] = {
    form.name: form
    for form in (
        Form(
            name="torch",
            layout="model",
            files=(CONFIG,),
            opens_with="`AutoModel` after `import hf_mtcompress`",
        ),
        Form(
            name="bitsandbytes",
            layout="model",
            files=(CONFIG,),
            extra="bitsandbytes",
            extras_to_write=("bitsandbytes",),
            backend="bitsandbytes",
            opens_with="`AutoModel` after `import hf_mtcompress`, with bitsandbytes",
        ),
        Form(
            name="torchao",
            layout="model",
            files=(CONFIG,),
            extra="torchao",
            extras_to_write=("torchao",),
            backend="torchao",
            opens_with="`AutoModel` after `import hf_mtcompress`, with torchao",
        ),
        Form(
            name="vanilla",
            layout="tasks",
            files=(CONFIG,),
            opens_with="plain transformers, one folder per task",
        ),
        Form(
            name="onnx",
            layout="graph",
            files=(ONNX_SETTINGS, ONNX_MODEL),
            extra="onnx",
            extras_to_write=("onnx",),
            backend="onnxruntime",
            runtime="ONNX Runtime",
            opens_with="`hf_mtcompress.load_predictor`, or ONNX Runtime itself",
        ),
        Form(
            name="openvino",
            layout="graph",
            files=(OPENVINO_SETTINGS, OPENVINO_MODEL, OPENVINO_WEIGHTS),
            extra="openvino",
            extras_to_write=("onnx", "openvino"),  # it is converted from an ONNX graph
            backend="openvino",
            runtime="OpenVINO",
            opens_with="`hf_mtcompress.load_predictor`, or OpenVINO itself",
        ),
    )
}


def form_of_backend(backend: str) -> Form:
    """The form that a quantize step writes with a backend."""
    return next(form for form in FORMS.values() if form.backend == backend)
