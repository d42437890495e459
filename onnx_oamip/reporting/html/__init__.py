"""HTML reports: one file per run, readable offline and in print, without scripts and external resources.

``prune``, ``frontier`` and ``compare`` turn documents into sections, with the shared parts of ``page`` and the drawings
of ``charts``; ``layout`` and ``page.html.j2`` render the file.
"""

from __future__ import annotations

from onnx_oamip.core.extras import imports_of

with imports_of("report", "an HTML report"):
    from onnx_oamip.reporting.html.compare import compare_page
    from onnx_oamip.reporting.html.frontier import frontier_page
    from onnx_oamip.reporting.html.prune import prune_page

__all__ = ["compare_page", "frontier_page", "prune_page"]
