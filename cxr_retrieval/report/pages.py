"""One offline HTML file from a template: everything inline, nothing fetched, every text escaped."""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(
    template: str, *, title: str, facts: Sequence[tuple[str, object]], script: str | None = None, **context: Any
) -> str:
    """HTML text of a template of this package that extends `base.html.j2`.

    `facts` are the (name, value) pairs under the title; those whose value is None or empty are left out. `script`
    names a file beside the templates. The page's own policy lets that one script run, by its hash, and no other.
    """
    environment = _environment()
    source = _source(script) if script else ""
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return environment.get_template(template).render(
        title=title,
        facts=[(name, _fact(value)) for name, value in facts if value is not None and value != ""],
        script=Markup(source),
        script_policy=Markup(f"'sha256-{digest}'" if source else "'none'"),
        **context,
    )


def finding_label(name: str) -> str:
    """A finding as people write it: `Pleural_Thickening` becomes `Pleural Thickening`."""
    return name.replace("_", " ")


@cache
def _environment() -> Environment:
    # Names of files, patients and findings come from archives that nobody here has written.
    environment = Environment(
        loader=PackageLoader("cxr_retrieval.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["finding"] = finding_label
    return environment


def _source(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _fact(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
