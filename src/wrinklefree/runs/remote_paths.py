"""Settings that name something to read may be addresses, such as `data.path=gs://...`: a copy is read."""

from wrinklefree.config.compose import all_settings
from wrinklefree.config.values import parse_value, setting
from wrinklefree.training import storage

READ = (
    "model",
    "model.pretrained",
    "data.path",
    "data.heldout_path",
    "data.self_questions",
    "distillation.cache",
    "distillation.teacher",
    "training.start_from",
)

LISTS = {"training.start_from": list[str]}


def fetched(overrides: list[str]) -> list[str]:
    """The overrides, followed by those that name the copies. Raises UserError if there is nothing to copy."""
    given = {key: _entries(key, value) for key, value in all_settings(overrides) if key in READ}
    copies = {key: storage.local_copies(value) for key, value in given.items()}
    return [*overrides, *(setting(key, value) for key, value in copies.items() if value != given[key])]


def _entries(key: str, value: object) -> object:
    """What a list's text stands for; other values as they are."""
    return parse_value(key, value, LISTS) if key in LISTS and isinstance(value, str) else value
