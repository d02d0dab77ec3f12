"""Take a pretrained causal language model to 1-2 bits per weight, and get a small file back that runs.

After `import wrinklefree`, transformers loads packed folders: `AutoModelForCausalLM.from_pretrained(folder)`.

Importing torch and transformers takes seconds, and `wf --help` imports this package. So the plug-in registers itself
when transformers' own table of quantizers is imported, which every model import does, and not before. It is an import
hook because the alternatives are worse: an eager import costs every `wf` command those seconds, and a second, light
top-level package for the command line would leave `python -m wrinklefree.cli` slow and the plug-in's presence dependent
on how Python was started.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLE = "transformers.quantizers.auto"
_PLUGIN = "wrinklefree.packed"


class _RegisterAfterImport(MetaPathFinder):
    """Imports the plug-in right after transformers' table of quantizers; finds that module once, nothing else ever."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenPlugin(spec.loader)
        return spec


class _ThenPlugin(Loader):
    """The module's own loader, followed by the import of the plug-in."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(_PLUGIN)


if _TABLE in sys.modules:
    importlib.import_module(_PLUGIN)
else:
    sys.meta_path.insert(0, _RegisterAfterImport())
