"""Pictures of charts, made in a process of their own.

The renderer (vl-convert) costs 130–200 MB and holds the interpreter's lock while it draws, so the dashboard
never imports it: ``python -m app.export png`` reads a Vega-Lite document on stdin and writes the picture.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Literal

from core.errors import SlimscopeError

Picture = Literal["png", "svg"]
PICTURES: dict[Picture, str] = {"png": "image/png", "svg": "image/svg+xml"}
PRINT_CONFIG = {
    "background": "#FFFFFF",
    "font": "Inter, Helvetica, Arial, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "gridColor": "#E9ECF1",
        "domainColor": "#C9CED8",
        "tickColor": "#C9CED8",
        "titleFontWeight": 500,
    },
    "legend": {"titleFontWeight": 500},
    "range": {
        "category": ["#3B5BDB", "#0F9D77", "#D9730D", "#9C36B5", "#C2255C", "#0B7285", "#74777F"],
        "heatmap": ["#F2F5FF", "#C0CCFC", "#7B94F1", "#4362DB", "#253C9B", "#1C2F78"],
        "ramp": ["#F2F5FF", "#C0CCFC", "#7B94F1", "#4362DB", "#253C9B", "#1C2F78"],
        "diverging": ["#9A3412", "#E08A3C", "#FBE7D3", "#DDE4FE", "#5C7AE8", "#1C2F78"],
    },
}
"""The light theme once more, because the renderer does not know Streamlit's."""


def picture(chart: Any, kind: Picture, *, width: int = 900) -> bytes:
    """An Altair chart as PNG (twice the pixels) or SVG; raises ``SlimscopeError`` when the renderer refuses."""
    import altair as alt

    if not isinstance(chart.width, (int, float)):
        chart = chart.properties(width=width)
    with alt.data_transformers.enable("default", max_rows=None):
        document = chart.configure(**PRINT_CONFIG).to_json()
    done = subprocess.run(
        [sys.executable, "-m", "app.export", kind],
        input=document.encode(),
        capture_output=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise SlimscopeError(f"the chart could not be drawn as {kind}: {words[-1] if words else 'no reason'}")
    drawn: bytes = done.stdout
    return drawn


def main() -> None:
    """Read a Vega-Lite document on stdin, write the picture on stdout."""
    import vl_convert

    document = sys.stdin.buffer.read().decode()
    if sys.argv[1] == "svg":
        sys.stdout.buffer.write(vl_convert.vegalite_to_svg(document).encode())
    else:
        sys.stdout.buffer.write(vl_convert.vegalite_to_png(document, scale=2))


if __name__ == "__main__":
    main()
