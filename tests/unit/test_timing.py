"""The one rule by which a time is given or said to be not measured, on numbers alone."""

import pytest

from hf_mtcompress.records.timing import Calls, Cost, Surroundings, cost_of, doubtful_times

COSTS = {
    "six": Cost(kernels="torch", parameters=600),
    "twin": Cost(kernels="torch", parameters=600),
    "three": Cost(kernels="torch", parameters=300),
    "int8": Cost(kernels="onnx int8", parameters=300),
    "unknown": Cost(kernels="torch", parameters=None),
}


def doubts(around: dict[int, Surroundings] | None = None, **times: float | tuple[float, float]) -> dict[str, list[int]]:
    """By artefact, batch sizes whose time does not hold; a pair of times is of batches of 1 and 32."""
    calls = {}
    for label, value in times.items():
        pair = value if isinstance(value, tuple) else (value,)
        calls[label] = {size: Calls(minimum_ms=ms, median_ms=ms) for size, ms in zip((1, 32), pair, strict=False)}
    return {label: sorted(rows) for label, rows in doubtful_times(calls, COSTS, around or {}).items()}


def test_times_that_hold():
    assert doubts(six=20.0, three=10.0, int8=1.0, unknown=99.0) == {}
    assert doubts(six=29.0, three=10.0, twin=20.0) == {}
    # MiniLM on two cores: torch float32, and ONNX Runtime in 8 bits.
    assert doubts(six=(19.0, 504.0), int8=(6.6, 136.0)) == {}


@pytest.mark.parametrize(
    ("cores", "threads", "others", "busy"),
    [
        (2, 2, 0.0, False),
        (2, 2, 0.25, False),
        (2, 2, 0.3, True),
        (2, 1, 1.0, False),
        (2, 1, 1.3, True),
        (2, 2, 1.0, True),
        (2, 4, 0.2, False),
        (16, 8, 8.0, False),
        (16, 8, 8.5, True),
        (2, 2, None, False),
    ],
)
def test_threads_need_their_cores(cores: int, threads: int, others: float | None, busy: bool):
    """All artefacts may be slowed down alike, so that no two of their times contradict each other."""
    around = Surroundings(cores=cores, threads=threads, others=others)
    assert doubts({1: around}, six=20.0, int8=2.0) == ({"six": [1], "int8": [1]} if busy else {})
    assert (around.busy() is not None) == busy


def test_load_counts_where_nothing_else_is_known():
    """A run's own training leaves as much load as there are cores, and some more."""
    assert Surroundings(cores=2, threads=2, load=23.0).busy() == "23.0 processes wanted to run on 2 cores"
    assert Surroundings(cores=2, threads=2, load=3.5).busy() is None
    assert Surroundings(cores=2, threads=2, load=23.0, others=0.0).busy() is None


def test_the_slower_of_two_batches_is_wrong():
    """A reference at 5,000 ms made a student of 5 ms "981 times as fast at batch size 1"."""
    assert doubts(six=(5000.0, 1500.0)) == {"six": [1]}
    assert doubts(six=(20.0, 961.0)) == {"six": [32]}
    assert doubts(six=(20.0, 959.0)) == {}
    assert doubts(six=(20.0, 17.0)) == {}


def test_the_slower_of_two_models_is_wrong():
    assert doubts(six=31.0, three=10.0) == {"six": [1]}
    assert doubts(six=10.0, three=16.0) == {"three": [1]}
    assert doubts(six=10.0, twin=16.0) == {"twin": [1]}
    assert doubts(six=(20.0, 500.0), three=(10.0, 800.0)) == {"three": [32]}
    # Other kernels may be faster by much, and not by a thousand.
    assert doubts(six=399.0, int8=10.0) == {}
    assert doubts(six=981.0, int8=1.0) == {"six": [1]}
    # A short call is mostly the fixed cost of a runtime.
    assert doubts(six=9.0, int8=0.1) == {}


@pytest.mark.parametrize(
    ("calls", "holds"),
    [
        (Calls(minimum_ms=10.0, median_ms=29.0), True),
        (Calls(minimum_ms=10.0, median_ms=31.0), False),
        (Calls(minimum_ms=10.0, median_ms=11.0, halves_ms=(10.0, 12.4)), True),
        (Calls(minimum_ms=10.0, median_ms=11.0, halves_ms=(12.6, 10.0)), False),
    ],
)
def test_a_minimum_is_found_again(calls: Calls, holds: bool):
    """The smallest of twenty calls that were all disturbed is a chance number."""
    assert (doubtful_times({"six": {1: calls}}, COSTS, {}) == {}) == holds


def test_costs_of_forms():
    """4-bit kernels of a package are like nothing else; tables are looked up, not multiplied with."""
    assert cost_of("torch", "float32", 500, 200) == Cost(kernels="torch", parameters=300)
    assert cost_of("onnx", "int8", 500, None) == Cost(kernels="onnx int8", parameters=500)
    assert cost_of("bitsandbytes", "nf4", 500, 200).kernels is None
    assert cost_of("openvino", "int8", None, None).parameters is None
