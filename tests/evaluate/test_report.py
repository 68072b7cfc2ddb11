import json
import re

import numpy as np
import pytest
from PIL import Image

from mmjax.evaluate import report
from mmjax.evaluate.report import Example

IMAGE = np.full((8, 8, 3), 200, np.uint8)
TABLE = [["split", "mean", "count"], ["held <out>", 0.99961, 200], ["blind", 0.25, None]]


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"note": "start"}, *({"step": step, "loss": 3.0 * 0.9**step} for step in range(60)), {"accuracy": 1.0}]
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def test_writes_a_page_and_two_images(tmp_path, metrics):
    examples = [Example(IMAGE, f"Question {i}?", "Words.", "Truth.", i % 2 == 0) for i in range(6)]
    page = report.write(tmp_path / "out" / "report", "A run", [metrics], examples, TABLE, {"steps": "60"})
    assert page == tmp_path / "out" / "report" / "report.html"
    for name in ("loss.png", "images.png"):
        with Image.open(page.parent / name) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.shape[0] > 300
        assert pixels.std() > 5  # something is drawn
    text = page.read_text()
    assert "<td>1.000</td><td>200</td>" in text
    assert "<td>0.250</td><td>–</td>" in text
    assert text.count("✓") == text.count("✗") == 3
    assert text.count("truth: Truth.") == 3  # only where the words were wrong
    assert "<dt>steps</dt><dd>60</dd>" in text


def test_page_needs_nothing_beside_it(tmp_path, metrics):
    page = report.write(tmp_path, "A run", [metrics], [Example(IMAGE, "?", "a", "b")], TABLE)
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page.read_text())
    assert len(sources) == 3  # the curve twice (light, dark) and the image
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_gates_of_an_earlier_run_are_drawn(tmp_path, metrics):
    """Their steps come before this run's; the plot shows each layer over the steps and over the depth."""
    earlier = tmp_path / "earlier.jsonl"
    records = [{"step": step, "loss": 4.0, "gates": [step / 100, step / 50]} for step in range(0, 40, 10)]
    earlier.write_text("\n".join(map(json.dumps, records)) + "\n")
    curves = report._curves([earlier, metrics])
    assert curves.starts == [31]
    assert curves.steps == [0, 10, 20, 30, *range(31, 91)]
    assert curves.gates[-1] == (30, [0.3, 0.6])
    page = report.write(tmp_path / "out", "A run", [earlier, metrics], [Example(IMAGE, "?", "a", "b")], TABLE)
    assert "<h2>Gates</h2>" in page.read_text()
    with Image.open(page.parent / "gates.png") as image:
        assert np.asarray(image.convert("L")).std() > 5
    without = report.write(tmp_path / "none", "A run", [metrics], [Example(IMAGE, "?", "a", "b")], TABLE)
    assert "<h2>Gates</h2>" not in without.read_text()
    assert not (without.parent / "gates.png").exists()


def test_words_are_escaped_and_not_taken_for_formulas(tmp_path, metrics):
    wild = "<script>alert('x')</script> $\\frac{$ & \"quoted\""
    page = report.write(tmp_path, wild, [metrics], [Example(IMAGE, wild, wild, wild, False)], [[wild], [wild]],
                        {wild: wild})
    text = page.read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; $\\frac{$ &amp; &quot;quoted&quot;") == 10


def test_silence_is_said(tmp_path, metrics):
    page = report.write(tmp_path, "A run", [metrics], [Example(IMAGE, "?", "", "b", None)], TABLE)
    assert "(nothing)" in page.read_text()


def test_no_loss_no_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="metrics.jsonl has no line"):
        report.write(tmp_path / "out", "A run", [tmp_path / "metrics.jsonl"], [], TABLE)
    assert not (tmp_path / "out").exists()


def test_uneven_table_is_refused(tmp_path, metrics):
    with pytest.raises(ValueError, match=r"3 columns.*\[1\]"):
        report.write(tmp_path / "out", "A run", [metrics], [], [["a", "b", "c"], ["x"]])


def test_smooth_keeps_length_and_constants():
    np.testing.assert_allclose(report._smooth([2.0] * 100), 2.0)
    assert len(report._smooth([1.0])) == 1
