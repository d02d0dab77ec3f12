"""Answers that follow a JSON schema: llguidance says before each token which tokens may come next.

The masks are applied where tokens are chosen, so an answer that ends by itself always follows the schema. One that
reaches `max_tokens` first is cut off.
"""

import json
import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from wrinklefree.serve.errors import ApiError

log = logging.getLogger("wrinklefree")

# As `json.dumps` writes it. Free white space would let a small model write spaces for ever.
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

COMPOSING = frozenset({"allOf", "not", "if", "dependentSchemas"})
OTHERS = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties"})  # say what others are
WORDS = frozenset({"title", "description", "default", "examples", "deprecated"})  # which constrain nothing
LITERAL = frozenset({"const", "enum", "default", "examples", "required"})  # values, not schemas
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})  # schemas by name


class Grammars:
    """Makes constraints for one model. What llguidance knows of the tokenizer is made at the first use."""

    def __init__(self, tokenizer: Any, vocab: int, ends: frozenset[int]) -> None:
        self._tokenizer, self._vocab, self._ends = tokenizer, vocab, ends

    def schema(self, schema: dict[str, Any], param: str = "response_format") -> "SchemaConstraint":
        """A constraint to texts that follow the JSON schema of the field `param`.

        Raises ApiError 400 if llguidance is missing, cannot use the tokenizer, or does not know the schema.
        """
        matcher = self._library.LLMatcher
        try:
            grammar = matcher.grammar_from_json_schema(json.dumps(closed(schema)), defaults=STYLE)
        except ValueError as error:
            raise _refusal(str(error), param) from None
        if fault := matcher.validate_grammar(grammar, self._words):
            raise _refusal(fault, param)
        return SchemaConstraint(matcher(self._words, grammar, log_level=0), self._vocab)

    @cached_property
    def _library(self) -> Any:
        try:
            import llguidance
        except ModuleNotFoundError:
            raise _refusal("this server lacks llguidance: pip install 'wrinklefree[structured]'") from None
        return llguidance

    @cached_property
    def _words(self) -> Any:
        """The tokenizer as llguidance sees it."""
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._vocab, eos_token=sorted(self._ends) or None)
        except ValueError as error:
            raise _refusal(f"llguidance cannot use this model's tokenizer ({error})") from None


def closed(schema: Any) -> Any:
    """`schema` with objects that have no properties but those that it names, unless it says what others are.

    By the letter of JSON Schema, others would be allowed, and small models then write them until there is no room left.
    Schemas that put objects together from parts (`allOf` and such) stay as they are, because a part does not know the
    properties of the others. An `allOf` of one part, by which older generators describe a reference, is that part.
    """
    whole = rewritten(schema, _merged)
    return whole if _composed(whole) else rewritten(whole, _closed)


def rewritten(node: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A JSON schema with `change` made to each schema in it, the inner ones first. Values that are none stay."""
    if isinstance(node, list):
        return [rewritten(item, change) for item in node]
    if not isinstance(node, dict):
        return node
    return change({name: value if name in LITERAL else _inside(name, value, change) for name, value in node.items()})


def _inside(name: str, value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """What a schema has under `name`. A property may be called `default` or `enum`: its schema is one, too."""
    if name in NAMED and isinstance(value, dict):
        return {key: rewritten(schema, change) for key, schema in value.items()}
    return rewritten(value, change)


def _merged(node: dict[str, Any]) -> dict[str, Any]:
    """`node` with the part of its `allOf`, if that has only one and nothing beside it constrains anything."""
    parts = node.get("allOf")
    if not isinstance(parts, list) or len(parts) != 1 or not isinstance(parts[0], dict):
        return node
    beside = {name: value for name, value in node.items() if name != "allOf"}
    return parts[0] | beside if beside.keys() <= WORDS else node


def _composed(node: Any) -> bool:
    if isinstance(node, list):
        return any(map(_composed, node))
    if not isinstance(node, dict):
        return False
    parts = COMPOSING & node.keys() or ("properties" in node and node.keys() & {"anyOf", "oneOf", "$ref"})
    return bool(parts) or any(map(_composed, node.values()))


def _closed(node: dict[str, Any]) -> dict[str, Any]:
    named = node.get("properties")
    whole = isinstance(named, dict) and set(node.get("required") or []) <= named.keys()
    return node | {"additionalProperties": False} if whole and not OTHERS & node.keys() else node


class SchemaConstraint:
    """A `Constraint` by llguidance."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab

    def allowed(self) -> NDArray[np.uint32]:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        words = np.zeros((self._vocab + 31) // 32, np.uint32)
        words.view(np.uint8)[: len(mask)] = mask[: words.nbytes]
        return words

    def accept(self, token: int) -> bool:
        self._matcher.consume_token(token)
        if self._matcher.is_error():  # such as a limit on a grammar's size
            log.warning("a structured answer ends early: %s", self._matcher.get_error().splitlines()[0])
        return bool(self._matcher.is_stopped())

    def copy(self) -> Self:
        return type(self)(self._matcher.deep_copy(), self._vocab)


def _refusal(why: str, param: str = "response_format") -> ApiError:
    return ApiError(400, f"{param}: {' '.join(why.split())[:300]}", param, "invalid_value")
