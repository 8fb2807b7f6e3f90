"""Sizes are counted to the byte; artefacts take turns in processes of their own; a busy machine is said to be one."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest

from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.evaluation import benchmark as module
from hf_mtcompress.evaluation.benchmark import (
    benchmark,
    measure_size,
    real_inputs,
)
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.sizes import count_parameters
from hf_mtcompress.model.surgery import cut, describe_structure
from hf_mtcompress.recipe import BenchmarkConfig
from hf_mtcompress.records.forms import ONNX_MODEL
from hf_mtcompress.records.timing import Calls, doubtful_times
from hf_mtcompress.tasks import SequenceClassification
from tests.tiny import tiny_encoder, tiny_image_rows
from tests.unit.formats.artefacts import saved_images, saved_text

CONFIG = BenchmarkConfig(tokens=16, batch_sizes=(1, 3), repetitions=4, warmup=1, threads=1, wait=0)
LONG = ["the very happy fox sleeps in the old barn"]


def test_artefacts_take_turns(monkeypatch: pytest.MonkeyPatch):
    """Timing one artefact after the other would blame whichever ran while the machine was busy."""
    saved = saved_text()
    turns: list[tuple[str, int]] = []
    timed = module._Worker.timed_turn

    def noted(self: module._Worker, batch_size: int, calls: int) -> list[float]:
        turns.append((self.label, batch_size))
        return timed(self, batch_size, calls)

    monkeypatch.setattr(module._Worker, "timed_turn", noted)
    folders = {"teacher": saved.folders["torch"], "int8": saved.folders["int8"]}
    result = benchmark(folders, reference="teacher", config=CONFIG, samples=LONG)
    forward, backward = ["teacher", "int8"], ["int8", "teacher"]
    assert [label for label, size in turns if size == 1] == forward + backward + forward + backward
    assert [size for _, size in turns] == [1] * 8 + [3] * 8
    for label in folders:
        assert [(row.batch_size, row.tokens, row.repetitions) for row in result.latency[label]] == [
            (1, 16, 4 * 5),
            (3, 16, 4 * 5),
        ]
        for row in result.latency[label]:
            assert row.minimum_ms is not None
            assert row.median_ms is not None
            assert 0 < row.minimum_ms <= row.median_ms
        assert (result.peak_memory_mb[label] or 0) > 10
    assert [row.ratio_minimum for row in result.latency["teacher"]] == [1.0, 1.0]
    small, large = result.latency["int8"][0], result.latency["teacher"][0]
    assert small.minimum_ms is not None
    assert large.minimum_ms is not None
    assert small.ratio_minimum == pytest.approx(small.minimum_ms / large.minimum_ms)
    # The process of an ONNX artefact does not load torch, which alone takes more than this.
    assert (result.peak_memory_mb["int8"] or 0) < 0.6 * (result.peak_memory_mb["teacher"] or 0)
    assert result.conditions["threads"] == 1
    assert result.conditions["tokens"] == 16
    json.dumps(result.conditions)


def test_all_get_as_many_calls_as_the_slowest(monkeypatch: pytest.MonkeyPatch):
    """The minimum over more calls is smaller, so a fast artefact must not be called more often."""
    saved = saved_text()
    monkeypatch.setattr(module, "_SETTLE_BELOW_MS", 0.0)
    result = benchmark({"teacher": saved.folders["torch"]}, reference="teacher", config=CONFIG, samples=LONG)
    assert [row.repetitions for row in result.latency["teacher"]] == [4, 4]
    slow = module._Worker.time

    def one_is_slow(self: module._Worker, batch_size: int, calls: int) -> list[float]:
        return [ms + 1000 * (self.label == "teacher" and batch_size == 3) for ms in slow(self, batch_size, calls)]

    monkeypatch.setattr(module, "_SETTLE_BELOW_MS", 500.0)
    monkeypatch.setattr(module._Worker, "time", one_is_slow)
    folders = {"teacher": saved.folders["torch"], "int8": saved.folders["int8"]}
    result = benchmark(folders, reference="teacher", config=CONFIG, samples=LONG)
    assert [[row.repetitions for row in rows] for rows in result.latency.values()] == [[20, 4], [20, 4]]


def test_no_process_outlives_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A worker left behind would disturb every later measurement."""
    started: list[module._Worker] = []
    begin = module._Worker.__enter__

    def noted(self: module._Worker) -> module._Worker:
        started.append(self)
        return begin(self)

    monkeypatch.setattr(module._Worker, "__enter__", noted)
    saved = saved_text()
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in saved.folders["onnx"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / ONNX_MODEL).write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="expected 'broken' to load and answer, but its process ended"):
        benchmark(
            {"teacher": saved.folders["torch"], "broken": broken}, reference="teacher", config=CONFIG, samples=LONG
        )
    assert len(started) == 2
    for worker in started:
        assert worker._process.returncode is not None
        with pytest.raises(ProcessLookupError):
            os.kill(worker._process.pid, 0)


def test_a_processor_that_lacks_an_instruction_is_named(monkeypatch: pytest.MonkeyPatch):
    """A runtime built for another processor ends its process without a word; the message must have some."""
    begin = module._Worker.__enter__

    def unlucky(self: module._Worker) -> module._Worker:
        begin(self)
        os.kill(self._process.pid, signal.SIGILL)
        return self

    monkeypatch.setattr(module._Worker, "__enter__", unlucky)
    message = r"'teacher' .* its process was ended by SIGILL \(an instruction that this processor, .*, does not have"
    with pytest.raises(ArtifactError, match=message):
        benchmark({"teacher": saved_text().folders["torch"]}, reference="teacher", config=CONFIG, samples=LONG)


def test_a_worker_that_hangs_is_ended():
    """A benchmark that waits for ever is worse than one that fails."""
    begin = time.monotonic()
    with pytest.raises(ArtifactError, match="no answer within 0 s"):
        benchmark(
            {"teacher": saved_text().folders["torch"]}, reference="teacher", config=CONFIG, samples=LONG, timeout=0.2
        )
    assert time.monotonic() - begin < 30


def test_the_reference_must_be_float_torch():
    """Ratios to an artefact that is already fast would make everything look slow."""
    saved = saved_text()
    with pytest.raises(ArtifactError, match="found 'onnx' of form onnx"):
        benchmark({"onnx": saved.folders["onnx"]}, reference="onnx", config=CONFIG, samples=LONG)
    with pytest.raises(ArtifactError, match="found 'teacher'"):
        benchmark({"onnx": saved.folders["onnx"]}, reference="teacher", config=CONFIG, samples=LONG)


@pytest.mark.parametrize("form", ["torch", "vanilla", "onnx"])
def test_inputs_are_full_of_real_tokens(form: str):
    """Padding is cheaper than tokens in some runtimes, and a short text would time less than is claimed."""
    inputs = real_inputs(saved_text().folders[form], [*LONG, ["the", "owl"], ("a fox", "an owl"), ""], 16, 6)
    assert inputs["input_ids"].shape == (6, 16)
    assert inputs["attention_mask"].all()
    assert (inputs["input_ids"] == 1).sum() == 0
    too_long = real_inputs(saved_text().folders[form], LONG, 1000, 1)
    assert too_long["input_ids"].shape[1] == (64 if form == "vanilla" else 24)
    pictures = list(tiny_image_rows(2)["image"])
    assert real_inputs(saved_images().folders[form], pictures, 16, 3)["pixel_values"].shape == (3, 3, 32, 32)


@pytest.mark.parametrize("form", ["torch", "onnx", "int8"])
def test_size_of_one_folder(form: str):
    """Tokenizer bytes in the weights, or embeddings counted as compressed, would shift every claim about size."""
    saved = saved_text()
    size = measure_size(saved.folders[form])
    files = {file.name: file.stat().st_size for file in saved.folders[form].iterdir()}
    assert size.weights_bytes == files["model.safetensors" if form == "torch" else ONNX_MODEL]
    assert size.tokenizer_bytes == sum(count for name, count in files.items() if name.startswith("tokenizer"))
    assert size.parameters == sum(parameter.numel() for parameter in saved.model.parameters())
    assert size.embedding_parameters == 160 * 32
    assert size.embedding_bytes == 160 * 32 * (1 if form == "int8" else 4)
    assert size.encoder_parameters is not None
    assert size.head_parameters is not None
    assert size.encoder_parameters + size.head_parameters == size.parameters


def test_layers_of_a_branch_are_the_encoders_not_the_heads():
    tasks = [SequenceClassification(name, labels=("a", "b"), head="linear") for name in ("one", "two")]
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks, branches={"side": ["two"]}, branch_layers=1)
    assert count_parameters(model)["head"] == sum(parameter.numel() for parameter in model.heads.parameters())


def test_size_of_plain_folders_is_their_sum():
    """Four tasks are four encoders on disk; the size of one of them would be a false promise."""
    saved = saved_text()
    size = measure_size(saved.folders["vanilla"])
    assert size.weights_bytes == sum(file.stat().st_size for file in saved.folders["vanilla"].rglob("*.safetensors"))
    assert size.parameters == sum(model.num_parameters() for model in map(saved.model.to_stock, saved.model.tasks))
    assert size.embedding_bytes == 4 * 160 * 32 * 4


def test_size_of_images_and_of_uneven_shapes(tmp_path: Path):
    """Images have no word embeddings; a cut model must not be counted in the shape of its config."""
    size = measure_size(saved_images().folders["torch"])
    assert (size.embedding_bytes, size.embedding_parameters) == (None, None)
    saved = saved_text()
    model = MultiTaskModel.from_pretrained(saved.folders["torch"])
    cut(model.encoder, heads={0: [0, 2]}, feed_forward={1: list(range(40))})
    model.config.structure = {"main": describe_structure(model.encoder)}
    model.save_pretrained(tmp_path / "cut")
    saved.processor.save_pretrained(tmp_path / "cut")
    model.export_task("mood", tmp_path / "plain" / "mood", saved.processor)
    assert measure_size(tmp_path / "cut").parameters == model.num_parameters()
    assert measure_size(tmp_path / "plain").parameters == model.to_stock("mood").num_parameters()
    parts = count_parameters(model)
    assert parts["encoder"] + parts["head"] == model.num_parameters()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="found nothing"):
        measure_size(tmp_path / "empty")


# ---- beside other work ----

QUICK = dataclasses.replace(CONFIG, repetitions=2, batch_sizes=(1,), wait=0.0)


def others_use(patch: pytest.MonkeyPatch, cores: float) -> None:
    """Two cores, of which other processes use so many."""
    patch.setattr(module, "available_cores", lambda: 2)
    patch.setattr(module, "busy_seconds", lambda: cores * time.monotonic() + time.process_time())
    patch.setattr(module, "_LOOK_SECONDS", 0.01)
    patch.setattr(module, "doubtful_times", doubtful_times)


def test_beside_other_work_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """A machine at load 23 gave a headline of "981 times as fast"."""
    others_use(monkeypatch, 4.0)
    folders = {"teacher": saved_text().folders["torch"]}
    result = benchmark(folders, reference="teacher", config=QUICK, samples=LONG)
    row = result.latency["teacher"][0]
    assert (row.minimum_ms, row.median_ms, row.ratio_minimum, row.ratio_median) == (None, None, None, None)
    assert "of 2 cores beside a timed thread" in (row.not_measured or "")
    assert result.conditions["not_measured"] == [f"teacher, batch 1: {row.not_measured}"]
    assert result.conditions["other_processes"]["1"] > 2
    assert result.minimum_ms["teacher"][1] > 0
    assert "of 2 cores" in (result.busy or "")
    assert "not measured, the machine was busy: teacher, batch 1" in caplog.text
    json.dumps(dataclasses.asdict(result), allow_nan=False)


def test_threads_are_those_that_others_leave(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """Two threads beside a busy process wait for each other; one is timed as if it were alone, and said to be one."""
    others_use(monkeypatch, 1.0)
    config = dataclasses.replace(QUICK, threads=None, wait=0.02)
    monkeypatch.setattr(module, "doubtful_times", lambda *_: {})
    folders = {"teacher": saved_text().folders["torch"]}
    result = benchmark(folders, reference="teacher", config=config, samples=LONG)
    assert result.conditions["threads"] == 1
    assert result.latency["teacher"][0].minimum_ms
    assert "waits for a quiet machine, up to 0 s: other processes use 1.0 of 2 cores" in caplog.text


@pytest.mark.parametrize(
    ("cores", "threads", "left"),
    [(0.0, 2, 2), (0.2, 2, 2), (0.5, 2, 1), (1.0, 2, 1), (1.0, 1, 1), (1.6, 2, 0), (9, 2, -6)],
)
def test_a_quiet_moment_is_waited_for(monkeypatch: pytest.MonkeyPatch, cores: float, threads: int, left: int):
    others_use(monkeypatch, cores)
    assert module._wait_for_quiet(threads, 0.02) == left
    monkeypatch.setattr(module, "busy_seconds", lambda: None)
    assert module._wait_for_quiet(threads, 0.02) == threads


def test_waiting_ends_when_it_gets_quiet(monkeypatch: pytest.MonkeyPatch):
    """Waiting to the end in any case would cost everybody half a minute."""
    others_use(monkeypatch, 0.0)
    begin = time.monotonic()
    monkeypatch.setattr(module, "busy_seconds", lambda: 3.0 * min(time.monotonic(), begin + 0.1) + time.process_time())
    assert module._wait_for_quiet(2, 60.0) == 2
    assert time.monotonic() - begin < 30


def test_what_does_not_hold_is_taken_again(monkeypatch: pytest.MonkeyPatch):
    """A backup that ran for a minute would otherwise cost a run all its times."""
    others_use(monkeypatch, 0.0)
    rounds: list[int] = []

    def doubtful(*_: object) -> dict[str, dict[int, str]]:
        rounds.append(1)
        return {"teacher": {1: "odd"}} if len(rounds) == 1 else {}

    monkeypatch.setattr(module, "doubtful_times", doubtful)
    config = dataclasses.replace(QUICK, wait=0.02)
    folders = {"teacher": saved_text().folders["torch"]}
    result = benchmark(folders, reference="teacher", config=config, samples=LONG)
    assert len(rounds) == 2
    assert result.latency["teacher"][0].not_measured is None


def test_turns_are_halved(monkeypatch: pytest.MonkeyPatch):
    """The minimum of each half is of its own turns; few turns have no halves."""
    found = module._calls({1: [[5.0, 4.0], [3.0, 6.0], [9.0, 2.0], [7.0, 8.0]], 2: [[1.0], [2.0], [4.0]]})
    assert found[1] == Calls(minimum_ms=2.0, median_ms=5.5, halves_ms=(3.0, 2.0))
    assert found[2] == Calls(minimum_ms=1.0, median_ms=2.0, halves_ms=None)
