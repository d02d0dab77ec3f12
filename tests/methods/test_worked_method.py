"""The method that is worked in docs/architecture.md keeps the contract of methods, and trains."""

import inspect
from pathlib import Path

import pytest
import test_contract
from pages import blocks, put
from toyrun import overrides, run, toy_files

from wrinklefree.config.compose import load_config
from wrinklefree.core.method import QuantMethod, find, quant_layers
from wrinklefree.models.load import load_model


def test_the_worked_method_keeps_the_contract_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every promise of test_contract.py that takes a method or a model alone holds for it."""
    monkeypatch.chdir(tmp_path)
    toy_files(tmp_path)
    for path, code in blocks("docs/architecture.md").items():
        put(tmp_path, path.replace("config/yaml", "configs"), code)
    method = find("sign")(name="sign")
    assert isinstance(method, QuantMethod)
    kept = 0
    for name, test in vars(test_contract).items():
        wanted = set(inspect.signature(test).parameters) if name.startswith("test_") else {""}
        if wanted and wanted <= {"method", "default", "model"}:
            given = {"method": method, "default": method, "model": method.prepare(test_contract.net())}
            test(**{key: given[key] for key in wanted})
            kept += 1
    assert kept > 10
    settings = [s for s in overrides(tmp_path, "training.max_steps=3") if s != "training=fairy2_w2"]
    run(load_config([*settings, "training=sign"]))
    model, _ = load_model(tmp_path / "run" / "final")
    assert quant_layers(model)
