"""
One section of a model card that this library owns, in a text whose other parts belong to somebody else.

The section stands between two HTML comments. The first one holds two digests: of the section as it was written, and of
the text around it where a program wrote that too. So a later write knows what a person has edited since, and never
takes it away. Metadata is only ever added to.
"""

from __future__ import annotations

import functools
import hashlib
import re

import yaml
from huggingface_hub import RepoCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from ..errors import CardError
from .escaping import python_string
from .section import SOURCE_NAME

_BEGIN = re.compile(
    r"<!-- hf_compressm:begin(?: section=(?P<section>[0-9a-f]{12}))?(?: rest=(?P<rest>[0-9a-f]{12}))? -->\n?"
)
_END = "<!-- hf_compressm:end -->"
_NOTE = "<!-- Written by hf_compressm. Text outside of these comments is kept; the section is written anew. -->\n"

# What other libraries write into cards that nobody has edited yet.
_MACHINE_MADE = (
    "<!-- This model card has been generated automatically according to the information the Trainer had access to.",
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated.",
)


def merge_card(existing: str | None, fresh: str) -> str:
    """
    Put a freshly rendered card into the card that is there.

    - No card, or one that only programs have written: the fresh card takes its place.
    - A card that a person has edited: its text stays, its section is replaced (or appended), and metadata is added to
      its own. A section that a person has edited stays as ordinary text, with the new one below it.

    Args:
        existing (`str`, *optional*): The card that is there.
        fresh (`str`): A card from [`~cards.render_card`], with a section.

    Raises:
        [`~errors.CardError`]: the metadata of the existing card is not YAML. Nothing was lost.
    """
    if existing is None or not existing.strip():
        return _seal(fresh, rest_is_ours=True)
    if is_machine_made(existing):
        return _seal(_with_metadata(fresh, read_metadata(existing), read_metadata(fresh)), rest_is_ours=True)
    return _insert(existing, fresh, rest_is_ours=False)


def merge_trainer_card(existing: str | None, trainer_card: str, fresh: str) -> str:
    """
    Put a freshly rendered card's section into the card that the Trainer has just written over an existing one.

    Args:
        existing (`str`, *optional*): The card that was there before the Trainer wrote its own.
        trainer_card (`str`): The Trainer's card.
        fresh (`str`): A card from [`~cards.render_card`], with a section.

    Raises:
        [`~errors.CardError`]: the metadata of a card is not YAML.
    """
    present = {} if existing is None else read_metadata(existing)
    theirs = _joined(present, read_metadata(trainer_card))
    if existing is None or not existing.strip() or is_machine_made(existing):
        return _insert(_with_metadata(trainer_card, theirs), fresh, rest_is_ours=True)
    return _insert(_with_metadata(existing, theirs), fresh, rest_is_ours=False)


def renamed(card: str, name: str) -> str:
    """
    The card with another name in the line that loads the model; one whose section a person has edited stays as it is.

    Args:
        card (`str`): A card with a section.
        name (`str`): The repository's or the folder's name.
    """
    found = _find(card)
    if found is None or found[2]["section"] != _digest(card[found[2].end() : found[1]]):
        return card
    start, end, begin = found
    line = re.compile(r"(= AutoModel\w*\.from_pretrained\()\"[^\"\n]*\"")
    section = line.sub(lambda match: f"{match[1]}{python_string(name)}", card[start:end])
    return _seal(card[:start] + section + card[end:], rest_is_ours=begin["rest"] is not None and is_machine_made(card))


def is_machine_made(card: str) -> bool:
    """Whether no person has edited the card outside of the section: a program's text, unchanged."""
    found = _find(card)
    if found is None:
        return any(mark in card for mark in _MACHINE_MADE)
    start, end, begin = found
    rest, section = _digest(_body(card[:start]) + card[end:]), _digest(card[begin.end() : end])
    return begin["rest"] == rest and begin["section"] == section


def _insert(card: str, fresh: str, rest_is_ours: bool) -> str:
    """The card with the fresh card's section and metadata."""
    found, fresh_found = _find(card), _find(fresh)
    section = fresh[fresh_found[0] : fresh_found[1]]
    if found is None:
        card = f"{card.rstrip()}\n\n{section}\n"
    else:
        start, end, begin = found
        edited = begin["section"] is not None and begin["section"] != _digest(card[begin.end() : end])
        if edited:
            body = card[begin.end() : end].removesuffix(_END).replace(_NOTE, "").rstrip()
            section = f"{body}\n\n{section}"
        card = card[:start] + section + card[end:]
    return _seal(_with_metadata(card, read_metadata(card), read_metadata(fresh)), rest_is_ours)


def _find(card: str) -> tuple[int, int, re.Match[str]] | None:
    """Start and end of the section, comments included, and the match of its first comment."""
    begin = _BEGIN.search(card)
    if begin is None:
        return None
    end = card.find(_END, begin.end())
    # Where the last comment is missing, it is unknown what belongs to the section: all of it is kept as text.
    return begin.start(), begin.end() if end < 0 else end + len(_END), begin


def _seal(card: str, rest_is_ours: bool) -> str:
    """The card with the digests of what it holds in the section's first comment."""
    start, end, begin = _find(card)
    body = card[begin.end() : end].replace(_NOTE, "")
    body = _NOTE + body
    rest = f" rest={_digest(_body(card[:start]) + card[end:])}" if rest_is_ours else ""
    return f"{card[:start]}<!-- hf_compressm:begin section={_digest(body)}{rest} -->\n{body}{card[end:]}"


def _digest(text: str) -> str:
    # Line endings and outer blanks change on the way through editors and the Hub without anybody meaning it.
    normal = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return hashlib.sha256(normal.encode()).hexdigest()[:12]


def read_metadata(card: str) -> dict:
    """
    The metadata at the head of a card; empty where it has none.

    Args:
        card (`str`): The card's text.

    Raises:
        [`~errors.CardError`]: it is not YAML, or would build something else than plain values.
    """
    if REGEX_YAML_BLOCK.match(card) is None:
        return {}
    try:
        return RepoCard(card).data.to_dict()
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise CardError(
            f"the metadata at the head of README.md cannot be read: {' '.join(str(error).split())}. Correct the lines "
            "between the two `---`, or remove the file and have it written anew."
        ) from error


def _body(card: str) -> str:
    """The card without the metadata at its head."""
    block = REGEX_YAML_BLOCK.match(card)
    return card[block.end() :] if block else card


def _with_metadata(card: str, *parts: dict) -> str:
    """The card with other metadata: the first part's, and what the further parts add to it."""
    merged = functools.reduce(_joined, parts)
    return f"---\n{yaml_dump(merged, sort_keys=False).strip()}\n---\n\n{_body(card).lstrip()}"


def _joined(present: dict, added: dict) -> dict:
    """Metadata added to what is there: lists are joined, and any other value that is there already stays."""
    merged = dict(present)
    for name, value in added.items():
        if name == "model-index":
            merged[name] = _joined_index(present.get(name), value)
        elif name in ("tags", "datasets", "metrics"):
            merged[name] = list(dict.fromkeys([*_as_list(present.get(name)), *_as_list(value)]))
        elif present.get(name) is None:
            merged[name] = value
    return merged


def _joined_index(present: object, added: list) -> list:
    """A model index with the results of the same origin replaced and everybody else's kept."""
    if not isinstance(present, list) or not present or not isinstance(present[0], dict):
        return added
    new = _as_list(added[0].get("results"))
    ours_are_new = any(_origin(result)[0] == SOURCE_NAME for result in new)
    replaced = {_origin(result) for result in new}
    kept = [
        result
        for result in _as_list(present[0].get("results"))
        if _origin(result) not in replaced and not (ours_are_new and _origin(result)[0] == SOURCE_NAME)
    ]
    return [{**present[0], "results": [*kept, *new]}, *present[1:]]


def _origin(result: object) -> tuple:
    """Who measured a result, at what, on which data."""

    def field(part: str, name: str) -> object:
        value = result.get(part) if isinstance(result, dict) else None
        return str(value.get(name)) if isinstance(value, dict) else None

    return field("source", "name"), field("task", "type"), field("dataset", "type"), field("dataset", "name")


def _as_list(value: object) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
