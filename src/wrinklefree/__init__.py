"""Take a pretrained causal language model to 1-2 bits per weight, and get a small file back that runs.

After `import wrinklefree`, transformers loads packed folders: `AutoModelForCausalLM.from_pretrained(folder)`.

The plug-in for transformers registers itself later, when transformers imports its table of quantizers.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# The hook below imports _PLUGIN right after _TABLE, which every model class of transformers imports. An eager import
# would slow every command down: `wf --help` imports this package, and importing torch and transformers takes seconds.
# A second, light package for the command line would leave `python -m wrinklefree.cli` slow, and whether the plug-in is
# there would depend on how Python was started.
_TABLE = "transformers.quantizers.auto"
_PLUGIN = "wrinklefree.packed"


class _RegisterAfterImport(MetaPathFinder):
    """An import hook that finds one module, transformers' table of quantizers, and then removes itself."""

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
    """Load the module with its own loader, then import the plug-in."""

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
