"""The finder that calls back after an import, on small modules of its own. The order of the real ones is tested in
tests/architecture/test_import_orders.py."""

import copy
import importlib
import importlib.util
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_mtcompress.registration_hooks import PostImportFinder


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the callbacks saw of the modules `hooked.one` and `hooked.two`, which a finder waits for."""
    package = tmp_path / "hooked"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("one", "two"):
        (package / f"{name}.py").write_text(f"began = '{name}'\nended = '{name}'\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    seen: list[str] = []
    yield seen
    sys.meta_path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == "hooked"]:
        del sys.modules[name]


def finder_of(seen: list[str]) -> PostImportFinder:
    def see(name: str) -> None:
        # Fails where the module has not been executed to its end.
        seen.append(importlib.import_module(f"hooked.{name}").ended)

    return PostImportFinder({"hooked.one": lambda: see("one"), "hooked.two": lambda: see("two")})


def test_called_after_each_import_and_gone_after_the_last(called: list[str]):
    finder = finder_of(called)
    finder.install()
    one = importlib.import_module("hooked.one")
    assert called == ["one"]
    assert finder in sys.meta_path
    importlib.import_module("hooked.two")
    assert called == ["one", "two"]
    assert finder not in sys.meta_path
    # Nothing of the detour stays: tools look at the loader for sources and data.
    assert type(one.__loader__) is type(one.__spec__.loader) is importlib.machinery.SourceFileLoader


def test_modules_that_are_there_are_not_waited_for(called: list[str]):
    importlib.import_module("hooked.one")
    finder = finder_of(called)
    finder.install()
    assert called == ["one"]
    finder.install()  # as when this package is reloaded
    assert called == ["one", "one"]
    assert sys.meta_path.count(finder) == 1


def test_asking_for_a_spec_uses_nothing_up(called: list[str]):
    """`find_spec` is how libraries ask whether another one is there."""
    finder_of(called).install()
    spec = importlib.util.find_spec("hooked.one")
    assert spec is not None
    assert spec.loader is not None
    assert "ended" in spec.loader.get_source("hooked.one")
    assert called == []
    importlib.import_module("hooked.one")
    assert called == ["one"]


def test_lazy_loader(called: list[str]):
    """A module that its own user loads lazily is reported when it is really executed."""
    finder_of(called).install()
    spec = importlib.util.find_spec("hooked.one")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules["hooked.one"] = module
    spec.loader.exec_module(module)
    assert called == []
    assert module.began == "one"
    assert called == ["one"]


def test_failed_import_is_tried_again(called: list[str], tmp_path: Path):
    finder_of(called).install()
    file = tmp_path / "hooked/one.py"
    text = file.read_text()
    file.write_text("raise ImportError('not today')")
    with pytest.raises(ImportError, match="not today"):
        importlib.import_module("hooked.one")
    assert called == []
    file.write_text(text + "# of another size, so that no cached bytecode is taken\n")
    importlib.import_module("hooked.one")
    assert called == ["one"]


def test_reload_is_undisturbed(called: list[str]):
    finder_of(called).install()
    one = importlib.import_module("hooked.one")
    one.began = None
    assert importlib.reload(one) is one
    assert one.began == "one"
    assert called == ["one"]


@pytest.mark.parametrize("fails", [False, True])
def test_installed_in_the_middle_of_an_import(fails: bool, called: list[str], tmp_path: Path):
    """The module is in `sys.modules` already, yet has nothing to register with."""
    finder = finder_of(called)
    end = "raise ImportError('not today')" if fails else "ended = 'one'"
    (tmp_path / "hooked/one.py").write_text(f"import hooked\nhooked.finder.install()\nbegan = 'one'\n{end}\n")
    importlib.import_module("hooked").finder = finder
    if fails:
        with pytest.raises(ImportError, match="not today"):
            importlib.import_module("hooked.one")
        assert called == []
        (tmp_path / "hooked/one.py").write_text("ended = 'one'")
    one = importlib.import_module("hooked.one")
    assert called == ["one"]
    assert not one.__spec__._initializing
    assert "one" not in finder.waiting


def test_no_thread_sees_a_module_before_its_callback(called: list[str], tmp_path: Path):
    """Another thread that imports the same module must not use it before it is registered with."""
    (tmp_path / "hooked/one.py").write_text("import time\ntime.sleep(0.1)\nended = 'one'\n")

    def slow() -> None:
        time.sleep(0.1)
        importlib.import_module("hooked.one").registered = True

    finder = PostImportFinder({"hooked.one": slow})
    finder.install()
    found: list[bool] = []
    barrier = threading.Barrier(4)

    def use() -> None:
        barrier.wait()
        found.append(hasattr(importlib.import_module("hooked.one"), "registered"))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [True] * 4


def test_a_loader_can_be_copied(called: list[str]):
    """Tools that keep specs would end in a recursion without end."""
    finder_of(called).install()
    spec = importlib.util.find_spec("hooked.one")
    assert spec is not None
    assert copy.copy(spec.loader).get_source("hooked.one")
