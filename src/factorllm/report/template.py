"""Templates of the report and the model card."""

from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template


@cache
def read_template(name: str) -> Template:
    """A template beside this file; in HTML, values are escaped."""
    environment = Environment(
        undefined=StrictUndefined,
        autoescape=".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(files("factorllm.report").joinpath(name).read_text(encoding="utf-8"))
