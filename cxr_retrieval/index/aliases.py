"""Documents of a published index, and its aliases: names that point to one version each, and move.

What is read back is hostile input: its size is limited and its form is checked.
"""

import datetime
import json
import re
import secrets
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cxr_retrieval import storage
from cxr_retrieval.artifacts import CorruptArtifact
from cxr_retrieval.config import NAME
from cxr_retrieval.errors import UserError

ALIASES = "aliases"
DEFAULT_ALIAS = "latest"
VERSION_ID = r"^[0-9a-f]{20}$"
ALIAS_LIMIT = 64 << 10


class Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Alias(Document):
    """What an alias points to: `generation` counts its moves, `publish_id` tells whose move the last one was."""

    version: str = Field(pattern=VERSION_ID)
    predecessor: str | None = Field(pattern=VERSION_ID)
    generation: int = Field(ge=1)
    publish_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    moved_at: str = Field(max_length=40)


Found = TypeVar("Found", bound=Document)


def list_aliases(to: str) -> dict[str, Alias]:
    """All aliases at `to` by name, with what they point to."""
    to = storage.canonical(to)
    aliases = {name: read_alias(to, name)[0] for name in _alias_names(to)}
    return {name: alias for name, alias in aliases.items() if alias}


def move_alias(to: str, alias: str, version: str, old: Alias | None, tag: str | None) -> tuple[int, bool]:
    """Point the alias to `version` if it still has `tag`: the generation, and whether anything had to be done."""
    if old and old.version == version:
        return old.generation, False
    new = Alias(
        version=version,
        predecessor=old.version if old else None,
        generation=old.generation + 1 if old else 1,
        publish_id=secrets.token_hex(16),
        moved_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    try:
        if storage.replace(_alias_uri(to, alias), as_json(new.model_dump()), tag):
            return new.generation, True
    except Exception:
        # The answer is lost, not the write: only what is stored tells whether it was done.
        try:
            found = read_alias(to, alias)[0]
        except UserError as error:
            raise UserError(
                f"{error}; it is not known whether alias {alias!r} serves version {version} now: ask"
                " `jobs.versions list` before the same again"
            ) from error
        if found is None or found.publish_id != new.publish_id:
            raise
        return new.generation, True
    # A request that was sent twice is refused the second time: then the first was ours.
    winner = read_alias(to, alias)[0]
    if winner and winner.publish_id == new.publish_id:
        return new.generation, True
    if winner and winner.version == version:
        return winner.generation, False
    state = (
        f"it serves version {winner.version} (generation {winner.generation}, publish {winner.publish_id[:8]},"
        f" {winner.moved_at})"
        if winner
        else "it was removed"
    )
    raise UserError(
        f"{to}: somebody else moved alias {alias!r} meanwhile: {state}; version {version} is complete"
        " beside it: do the same again to put it in front, or leave it"
    )


def read_alias(to: str, alias: str) -> tuple[Alias | None, str | None]:
    """An alias and the tag for `storage.replace`; both None while there is none."""
    uri = _alias_uri(to, alias)
    found = storage.read_tagged(uri)
    if found is None:
        return None, None
    if len(found[0]) > ALIAS_LIMIT:
        raise CorruptArtifact(f"{uri}: too large for an alias; move it away and publish again")
    return parsed(Alias, uri, found[0]), found[1]


def parsed(model: type[Found], uri: str, data: bytes) -> Found:
    """A stored document, checked. Raises CorruptArtifact, one line, for whatever does not fit."""
    try:
        return model.model_validate(json.loads(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = f"{place}: {first['msg']}" if place else first["msg"]
    except (ValueError, RecursionError):
        reason = "it is not JSON"
    raise CorruptArtifact(f"{uri}: {reason}; move it away and publish again")


def listing(folder: str) -> dict[str, int]:
    """Names and sizes of a folder's files: one request for a thousand of them, where asking for each costs one each."""
    try:
        return {file.path: file.size for file in storage.list_files(folder)}
    except FileNotFoundError:
        return {}  # a folder without files exists on no object storage


def _alias_names(to: str) -> Iterator[str]:
    for path in listing(storage.join(to, ALIASES)):
        name = path.removesuffix(".json")
        if name != path and re.fullmatch(NAME, name):
            yield name


def check_alias(alias: str) -> None:
    """Raises UserError for a name that no alias may have."""
    if not re.fullmatch(NAME, alias) or re.fullmatch(VERSION_ID, alias):
        raise UserError(
            f"no alias may be called {alias!r}: one has letters, digits, '.', '_' and '-', at most 64 and a letter or"
            " digit first, and does not look like a version id"
        )


def known(to: str) -> str:
    names = sorted(_alias_names(to))
    return f"it has {', '.join(names)}" if names else "nothing is published there: publish first or check the URI"


def _alias_uri(to: str, alias: str) -> str:
    return storage.join(to, ALIASES, f"{alias}.json")


def as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
