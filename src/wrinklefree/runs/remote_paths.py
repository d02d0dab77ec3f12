"""Settings that name something to read may be addresses, such as `data.path=gs://...`: a copy is read."""

from wrinklefree.config.compose import all_settings
from wrinklefree.config.values import setting
from wrinklefree.training import storage

READ = (
    "model",
    "model.pretrained",
    "data.path",
    "data.heldout_path",
    "data.self_questions",
    "distillation.cache",
    "distillation.teacher",
)


def fetched(overrides: list[str]) -> list[str]:
    """The overrides, followed by those that name the copies. Raises UserError if there is nothing to copy."""
    given = dict(all_settings(overrides))
    there = {key: value for key, value in given.items() if key in READ and _is_address(value)}
    return [*overrides, *(setting(key, str(storage.fetch(value))) for key, value in there.items())]


def _is_address(value: object) -> bool:
    # builtin:NAME has no slashes, and hub ids have no scheme.
    return isinstance(value, str) and storage.is_remote(value)
