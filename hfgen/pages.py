"""Templates of the self-contained HTML pages: nothing in them is fetched from anywhere."""

from functools import cache
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template


@cache
def page_template(name: str) -> Template:
    """Return a template.

    Args:
        name: path within the package, such as "studies/page.html"; it extends `page_base.html`.
    """
    loader = FunctionLoader(lambda path: files("hfgen").joinpath(path).read_text(encoding="utf-8"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)
