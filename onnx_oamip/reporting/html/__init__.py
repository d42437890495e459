"""Reports as one HTML file each, readable offline and in print: no script, and nothing that is fetched.

``prune.py`` and ``frontier.py`` turn documents into plain sections with what ``page.py`` lends them, ``charts.py``
draws, ``layout.py`` and ``page.html.j2`` make the file.
"""

from __future__ import annotations

from onnx_oamip.core.extras import imports_of

with imports_of("report", "an HTML report"):
    from onnx_oamip.reporting.html.frontier import frontier_page
    from onnx_oamip.reporting.html.prune import prune_page

__all__ = ["frontier_page", "prune_page"]
