"""Reports as one HTML file each, readable offline and in print: no script, and nothing that is fetched.

``prune.py`` and ``frontier.py`` turn documents into plain sections with what ``page.py`` lends them, ``charts.py``
draws, ``layout.py`` and ``page.html.j2`` make the file.
"""

from __future__ import annotations

from ..errors import EnvironmentMissing

try:
    from .frontier import frontier_page
    from .prune import prune_page
except ModuleNotFoundError as error:  # pragma: no cover - both packages come with this one
    if error.name not in ("jinja2", "matplotlib"):
        raise
    raise EnvironmentMissing(f"--report needs the package {error.name}; run 'pip install {error.name}'.") from error

__all__ = ["frontier_page", "prune_page"]
