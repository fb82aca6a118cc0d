"""A template and its values -> one self-contained HTML file, which makes no network request.

Its Content-Security-Policy forbids them: two hashes name the only style and the only script that may run. The text of a
page comes from datasets and may be hostile: every value passes `visible` and Jinja's escaping, or is JSON that the
script shows as text.
"""

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

import PIL.Image
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from finetune.console import visible

TEMPLATES = Path(__file__).parent

THUMBNAIL = 320
"""Pixels of the longer side."""


def render(template: str, *, data: Any, **values: Any) -> str:
    """Return the page `TEMPLATE.html` of this folder; its script finds `data` as JSON."""
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    script = (TEMPLATES / f"{template}.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    code: dict[str, str] = {}
    for kind, text in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
        code |= {kind: Markup(text), f"{kind}_hash": f"sha256-{digest}"}  # noqa: S704
    return environment.get_template(f"{template}.html").render(data=visible(data), **code, **values)


def thumbnail(image: PIL.Image.Image, width: int = THUMBNAIL) -> str:
    """Return a JPEG data URI of at most `width` pixels a side, with transparency on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.thumbnail((width, width))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")


def number(value: Any) -> str:
    """Return a number as it is read: 1234567 -> "1,234,567", 0.98765 -> "0.988", None -> "–"."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3g}" if isinstance(value, float) else "–"


def share(part: int, whole: int) -> str:
    """Return a percentage: 1 of 3 -> "33.3%"."""
    return f"{part / whole:.1%}" if whole else "–"
