from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest

from app.charts import chart
from app.export import picture
from core.types import View

FRAME = pd.DataFrame({"x": [0, 1, 2], "y": [1.0, 2.0, 1.5]})


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<svg")])
def test_a_chart_becomes_a_picture_in_another_process(kind, start):
    assert picture(chart(FRAME, View("line", x="x", y="y")), kind).startswith(start)


def test_the_dashboard_never_loads_the_renderer():
    code = "import sys, app.components.export_menu; print('vl_convert' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
