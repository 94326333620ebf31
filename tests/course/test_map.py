"""The map of the course: it shows the plan, can be read, and the files that pages show are up to date."""

import re

import pytest
from figure_check import problems
from lessonfiles import BUILT, LESSONS
from matplotlib.colors import to_hex

from minilora.course.map import map_figure, map_text
from minilora.course.plan import LESSONS as PLAN
from minilora.course.plan import Lesson
from minilora.pages.style import GREY, LORA, save, theme

SMALL = {
    0: Lesson(0, "00_a", "Is it first?", (20,), (), "a", True),
    2: Lesson(2, "02_b", "Is it extra?", (30, 10), (0,), "b", False),
    5: Lesson(5, "05_c", "Is it last?", (5,), (0, 2, 4), "c", True),  # 4 is not in the plan
}
ARC = r"lesson-(\d+)-needed-by-(\d+)"


def content(svg):
    """What a map shows: its texts, from the comments that matplotlib writes, and the names of its arcs."""
    return re.findall(r"<!-- (.*?) -->", svg), [(int(a), int(b)) for a, b in re.findall(ARC, svg)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("lessons", "ground"), [(PLAN, "light"), (PLAN, "dark"), (SMALL, "light"), ({0: SMALL[0]}, "light")]
)
def test_the_map_can_be_read(lessons, ground):
    with theme(ground):
        assert problems(map_figure(lessons)) == []


@pytest.mark.long
@pytest.mark.parametrize("name, ground", [("course-map.svg", "light"), ("course-map-dark.svg", "dark")])
def test_the_maps_of_the_page_show_the_plan(name, ground, tmp_path):
    with theme(ground):
        save(map_figure(), tmp_path / name)
    shown = (LESSONS / "pictures" / name).read_text("utf-8")
    assert content(shown) == content((tmp_path / name).read_text("utf-8")), "run: python lessons/build.py --pages"
    texts, arcs = content(shown)
    assert {lesson.question for lesson in PLAN.values()} <= {*texts}
    assert sorted(arcs) == sorted((a, b) for b, lesson in PLAN.items() for a in lesson.needs)
    readme = (LESSONS / "README.md").read_text("utf-8")
    assert f'"pictures/{name}"' in readme.partition("## ")[0]  # at the top


def test_the_map_in_lesson_0_shows_the_plan():
    outputs = [output for cell in BUILT["00_what_can_lora_do.ipynb"]["cells"] for output in cell.get("outputs", [])]
    texts = ["".join(output.get("data", {}).get("text/plain", "")) for output in outputs]
    assert map_text() in texts, "run: python lessons/build.py 00_what_can_lora_do"


def test_a_map_has_the_lessons_below_each_other_and_an_arc_for_each_need():
    figure = map_figure(SMALL)
    (axes,) = figure.axes
    path, *circles = axes.lines
    heights = [circle.get_ydata()[0] for circle in circles]
    assert heights == sorted(heights, reverse=True) and len(heights) == 3
    assert list(path.get_ydata()) == [heights[0], heights[2]] and to_hex(path.get_color()) == LORA.lower()
    filled = [to_hex(circle.get_markerfacecolor()) == LORA.lower() for circle in circles]
    assert filled == [True, False, True] and to_hex(circles[1].get_markeredgecolor()) == GREY.lower()
    rows = {round(y, 6): [text for text in axes.texts if abs(text.get_position()[1] - y) < 1e-9] for y in heights}
    said = [[text.get_text() for text in sorted(row, key=lambda text: text.get_position()[0])] for row in rows.values()]
    assert said == [["0", "Is it first?", "20"], ["2", "Is it extra?", "40"], ["5", "Is it last?", "5"]]
    assert [row[0].get_fontweight() for row in rows.values()] == ["bold", "normal", "bold"]
    named = [(patch, re.fullmatch(ARC, patch.get_gid())) for patch in axes.patches if patch.get_gid()]
    arcs = {(int(found[1]), int(found[2])): patch.get_path() for patch, found in named}
    assert arcs.keys() == {(0, 2), (0, 5), (2, 5)}
    for numbers, arc in arcs.items():
        ends = tuple(heights[[*SMALL].index(number)] for number in numbers)
        assert (arc.vertices[0, 1], arc.vertices[-1, 1]) == ends
        assert axes.get_xlim()[0] < arc.get_extents().x0 < -0.2  # in the picture, and left of the circles
    tips = [patch.get_xy() for patch in axes.patches if not patch.get_gid()]
    assert sorted({tip[:, 1].mean().round(6) for tip in tips}) == sorted(round(y, 6) for y in heights[1:])


def test_the_map_in_words():
    first, extra = "0. Is it first? (20 minutes)", "2. Is it extra? (40 minutes; needs 0)"
    assert map_text(SMALL).endswith(f": {first} {extra} 5. Is it last? (5 minutes; needs 0, 2, 4)")
