"""A template and its values -> one self-contained HTML file, which asks the network for nothing.

Its Content-Security-Policy would not let it: two hashes name the only style and the only script it may use. The text it
shows comes from datasets, so it is hostile: every value passes `visible` and Jinja's escaping, or is JSON that the
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


def write(template: str, *, data: Any, **values: Any) -> str:
    """The page `TEMPLATE.html` of this folder; its script finds `data` as JSON."""
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
    code = {"style": Markup(style), "script": Markup(script)}  # noqa: S704
    hashes = {"style_hash": _hash(style), "script_hash": _hash(script)}
    return environment.get_template(f"{template}.html").render(data=visible(data), **code, **hashes, **values)


def _hash(code: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(code.encode()).digest()).decode("ascii")


def thumbnail(image: PIL.Image.Image, width: int = THUMBNAIL) -> str:
    """A JPEG data URI of at most `width` pixels a side, transparency on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.thumbnail((width, width))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")


def number(value: Any) -> str:
    """1234567 -> "1,234,567", 0.98765 -> "0.988", None -> "–"."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3g}" if isinstance(value, float) else "–"


def share(part: int, whole: int) -> str:
    """1, 3 -> "33.3%"."""
    return f"{part / whole:.1%}" if whole else "–"
