"""When transformers is told about this package: at once where it is loaded already, else as soon as it is.

`import hf_mtcompress` loads neither of the two, so what registers is tied to the modules of transformers that keep the
registries. Each registration runs right after its module was executed, before anybody can use it.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from hf_mtcompress.formats.registration import register_config, register_models, register_pipeline, register_quantizers


class PostImportFinder:
    """Calls a function once a module has been imported, and leaves `sys.meta_path` after the last one.

    It finds nothing by itself: it asks the finders behind it, and has a loader of theirs report back. Whoever only asks
    for a spec, as `importlib.util.find_spec` does, uses nothing up; an import that fails may be tried again.

    Args:
        after: by module name: what to call; calling it twice must do no harm.
    """

    def __init__(self, after: Mapping[str, Callable[[], None]]) -> None:
        self.after = dict(after)
        self.waiting = set[str]()

    def install(self) -> None:
        """Call what belongs to modules that are there, and wait for the others; again, it calls again."""
        self.waiting = set(self.after)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        # Only now: a module that another thread begins to import meanwhile is not missed.
        for name in self.after:
            if (module := sys.modules.get(name)) is not None and not self._watch(module):
                self.imported(name)

    def imported(self, name: str) -> None:
        """Module `name` has been executed."""
        self.after[name]()
        self.waiting.discard(name)
        if not self.waiting:
            with suppress(ValueError):
                sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders have for `name`, if it is waited for."""
        if name not in self.waiting:
            return None
        finders = list(sys.meta_path)
        # Those before this one have been asked; asking them again could go round in circles.
        for finder in finders[finders.index(self) + 1 :] if self in finders else finders:
            find = getattr(finder, "find_spec", None)
            if find is not None and (spec := find(name, path, target)) is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _ReportingLoader(spec.loader, self)
                return spec
        return None

    def _watch(self, module: ModuleType) -> bool:
        """Whether `module` is still being imported, here or in another thread; it is then reported when it is done."""
        spec = getattr(module, "__spec__", None)
        if not getattr(spec, "_initializing", False):
            return False
        assert spec is not None
        vars(spec)["finder"] = self
        spec.__class__ = _WatchedSpec
        return spec._initializing  # done meanwhile?


class _ReportingLoader:
    """Executes a module as the loader it stands for does, then reports. The module shows that other loader only."""

    def __init__(self, loader: Any, finder: PostImportFinder) -> None:
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet: it is being copied
            raise AttributeError(name)
        return getattr(self.loader, name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.finder.imported(module.__name__)


class _WatchedSpec(ModuleSpec):
    """Reports when importlib clears `_initializing`, its last act for a module; there is no other sign of it."""

    finder: PostImportFinder

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            # An import that failed has left `sys.modules` by now.
            if name == "_initializing" and not value and self.name in sys.modules:
                self.finder.imported(self.name)
        finally:
            super().__setattr__(name, value)


_FINDER = PostImportFinder(
    {
        "transformers.models.auto.configuration_auto": register_config,
        "transformers.models.auto.modeling_auto": register_models,
        "transformers.quantizers.auto": register_quantizers,
        "transformers.pipelines": register_pipeline,
    }
)


def install() -> None:
    """See that transformers opens what this package saves, from now on; calling it again does no harm."""
    _FINDER.install()
