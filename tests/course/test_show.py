"""What lessons state and draw: claims with their bands, pictures with their texts."""

import base64
import io
import math

import matplotlib.pyplot as plt
import pytest
from lessonfiles import build_program
from PIL import Image

from minilora.course import claim, show
from minilora.course.claims import AGAIN
from minilora.course.compare import digits


@pytest.mark.parametrize(
    "value, low, high, line",
    [
        (134_515_008, 134_515_008, 134_515_008, "x: 134,515,008 (claimed: exactly that): holds"),
        (3.25812, 3.1, 3.4, "x: 3.258 (claimed: 3.1 to 3.4): holds"),
        (1.6e-9, -math.inf, 1e-7, "x: 1.6e-09 (claimed: at most 1e-07): holds"),
        (12.5, 10, math.inf, "x: 12.5 (claimed: at least 10): holds"),
        (0, 0, 0, "x: 0 (claimed: exactly that): holds"),
        (3.1, 3.1, 3.4, "x: 3.1 (claimed: 3.1 to 3.4): holds"),
    ],
)
def test_a_claim_prints_its_value_with_its_band(value, low, high, line, capsys):
    claim("x", value, low, high)
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize(
    "value, low, high, line",
    [
        (3.41, 3.1, 3.4, "x: 3.41 (claimed: 3.1 to 3.4): DOES NOT HOLD"),
        (3.09, 3.1, 3.4, "x: 3.09 (claimed: 3.1 to 3.4): DOES NOT HOLD"),
        (7, 8, 8, "x: 7 (claimed: exactly 8): DOES NOT HOLD"),
        (math.nan, 0, 1, "x: nan (claimed: 0 to 1): DOES NOT HOLD"),
    ],
)
def test_a_claim_fails_outside_its_band(value, low, high, line, capsys):
    with pytest.raises(AssertionError) as failed:
        claim("x", value, low, high)
    assert str(failed.value).splitlines() == [line, AGAIN] and capsys.readouterr().out == ""


def test_a_band_that_is_upside_down_is_refused():
    with pytest.raises(ValueError, match="smaller end first"):
        claim("x", 1, 2, 0)


@pytest.mark.parametrize(
    "value, text", [(12345.6, "12,346"), (0.000123456, "0.0001235"), (10.0, "10"), (1e20, "1e+20")]
)
def test_numbers_have_the_digits_that_a_reader_wants(value, text):
    assert digits(value) == text


# -- pictures ----------------------------------------------------------------------------------------------------------


def figure_with(**labels):
    figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
    axes.plot([1, 2, 3], [1, 4, 9], color="black")
    axes.set(**labels)
    return figure


def test_a_picture_without_a_sentence_is_refused():
    with pytest.raises(ValueError, match="alt must say in a sentence"):
        show(figure_with(), alt="a plot")
    plt.close("all")


def test_a_plain_script_shows_nothing_and_leaves_no_figure_open(capfd):
    plt.close("all")
    show(plt.figure(), alt="An empty white page")
    assert plt.get_fignums() == [] and capfd.readouterr() == ("", "")


SOURCE = """# %%
import matplotlib.pyplot as plt

from minilora.course import show

figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
axes.plot([1, 2, 3], color="black")
axes.set(xlabel="x", ylabel="y")
show(figure, alt="A line that rises from one to three.")
"""


def test_a_notebook_keeps_the_text_of_a_picture_that_is_twice_as_fine(tmp_path):
    program = build_program()
    (tmp_path / "01_demo.py").write_text(SOURCE, "utf-8")
    notebook = program.read_source(tmp_path / "01_demo.py")
    program.run(notebook)
    (output,) = notebook.cells[-1].outputs  # the figure is closed: it is not shown a second time
    assert output.metadata["image/png"] == {"alt": "A line that rises from one to three.", "width": 384}
    assert output.data["text/plain"] == "A line that rises from one to three."
    assert Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).size == (768, 576)
