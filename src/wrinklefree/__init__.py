"""Take a pretrained causal language model to 1-2 bits per weight, and get a small file back that runs.

After `import wrinklefree`, transformers loads packed folders: `AutoModelForCausalLM.from_pretrained(folder)`.
`wrinklefree.quantize(model)` does from Python what the commands do.

The plug-in for transformers registers itself later, when transformers imports its table of quantizers.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wrinklefree.runs.quantized import quantize as quantize

# What registers with another package, by the module of it that has to be imported before. The hook below imports it
# right after that. An eager import would slow every command down: `wf --help` imports this package, and importing torch
# and transformers takes seconds. A second, light package for the command line would leave `python -m wrinklefree.cli`
# slow, and whether the plug-in is there would depend on how Python was started.
_PLUGINS = {
    "transformers.quantizers.auto": "wrinklefree.packed",
    "peft.tuners.lora.model": "wrinklefree.packed.lora",
}


class _RegisterAfterImport(MetaPathFinder):
    """An import hook that finds the modules in `_PLUGINS` that were not imported yet."""

    def __init__(self, waiting: set[str]) -> None:
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        self.waiting.remove(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenPlugin(spec.loader, _PLUGINS[fullname])
        return spec


class _ThenPlugin(Loader):
    """Load the module with its own loader, then import the plug-in."""

    def __init__(self, loader: Loader, plugin: str) -> None:
        self.loader, self.plugin = loader, plugin

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.plugin)


for _module, _plugin in _PLUGINS.items():
    if _module in sys.modules:
        importlib.import_module(_plugin)
sys.meta_path.insert(0, _RegisterAfterImport(set(_PLUGINS) - set(sys.modules)))


def __getattr__(name: str) -> Any:
    """Import `quantize` when it is first used: it needs torch and transformers, and `wf --help` does not."""
    if name != "quantize":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("wrinklefree.runs.quantized").quantize
