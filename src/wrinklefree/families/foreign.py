"""Turns what transformers and its libraries raise on a broken folder into one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError

from wrinklefree.core.errors import UserError

# If a value has the wrong type or is out of range, each class of transformers fails in its own way.
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TemplateError,
    TypeError,
    ValueError,
)


NEEDS_CODE = (
    "it needs the Python code in it, which runs only if you trust it: add --trust-remote-code, or in a training "
    "model.trust_remote_code=true"
)


@contextmanager
def refused_in_one_line(what: str, advice: str = "") -> Iterator[None]:
    """Turn what a library raises inside the block into `UserError("WHAT: REASON")`.

    The block must only read files, with calls of transformers, tokenizers or safetensors: a defect of our own inside it
    would look like a broken file.
    """
    try:
        yield
    except REFUSALS as error:
        raise _said(what, error, advice) from error
    except BaseException as error:
        # tokenizers raises Exception itself, and no subclass of it. Its panics, in Rust, are no `Exception` at all, and
        # their class cannot be imported.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise _said(what, error, advice) from error


def _said(what: str, error: BaseException, advice: str) -> UserError:
    words = " ".join(str(error).split()) or type(error).__name__
    words = words.partition(" Model type should be one of ")[0]  # hundreds
    if "trust_remote_code" in words:
        return UserError(f"{what}: {NEEDS_CODE}")
    if isinstance(error, (KeyError, AttributeError, TypeError)):  # these say only a name or a type
        words = f"{type(error).__name__} {words}"
    return UserError(f"{what}: {words[:300]}{advice}")
