"""Many adapters beside one base: what is measured, and its picture."""

import pytest
from figure_check import problems

from minilora.commands import many
from minilora.models.load import find
from minilora.pages.style import theme

ADAPTER, BASE = 4 * 77_824, 4 * 1_049_728  # bytes on the tiny base


@pytest.fixture(scope="module")
def series():
    """The tiny base with a few adapters, read and mapped."""
    return {("tiny", mapped): many.measure("tiny", (1, 6), mapped) for mapped in (False, True)}


def test_what_shapes_predict_is_the_base_and_each_adapter_in_memory(series):
    assert [one.predicted_bytes for one in series["tiny", False]] == [BASE + ADAPTER, BASE + 6 * ADAPTER]
    assert [one.predicted_bytes for one in series["tiny", True]] == [BASE, BASE]


def test_adapters_in_memory_hold_their_numbers_and_mapped_ones_do_not(series):
    one, six = series["tiny", False]
    assert BASE + ADAPTER < one.held_bytes < BASE + 2 * ADAPTER
    assert 5 * ADAPTER < six.held_bytes - one.held_bytes < 6.5 * ADAPTER
    one, six = series["tiny", True]
    assert 0 < six.held_bytes - one.held_bytes < ADAPTER


def test_every_point_has_the_time_of_a_switch(series):
    assert all(0 < one.seconds < 5 for found in series.values() for one in found)


def test_a_picture_for_light_pages_and_one_for_dark_ones(tmp_path):
    counts, turns = {"tiny": (1, 2)}, []
    paths = list(many.draw(tmp_path / "new", counts, done=lambda: turns.append(1)))
    assert [path.name for path in paths] == ["growth-many.png", "growth-many-dark.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths) and len(turns) == many.turns(counts)


def test_smollm2_is_measured_where_it_is(monkeypatch):
    monkeypatch.setattr(many, "find", lambda name: None if name == "smollm2" else find(name))
    assert many.turns() == 4 * len(many.COUNTS["tiny"])
    monkeypatch.setattr(many, "find", lambda name: "there")
    assert many.turns() == 4 * sum(map(len, many.COUNTS.values()))


def test_the_picture_can_be_read(series):
    points = {
        ("tiny", False): [(1, 4.6), (1000, 366)],
        ("tiny", True): [(1, 4.2), (1000, 23)],
        ("smollm2", False): [(1, 549), (32, 853)],
        ("smollm2", True): [(1, 539), (32, 545)],
    }
    found = {
        key: [many.Many(n, int(1e6 * mb), int(0.9e6 * mb), 1e-3 if key[0] == "smollm2" else 2e-4) for n, mb in ends]
        for key, ends in points.items()
    }
    for name in ("light", "dark"):
        with theme(name):
            figure = many._drawn(found)
            assert problems(figure) == []
    memory, switch = figure.axes
    assert {text.get_text() for text in memory.texts} == {
        "tiny base, in memory",
        "tiny base, mapped",
        "SmolLM2-135M, in memory",
        "SmolLM2-135M, mapped",
    }
    measured, predicted = memory.lines[:2]
    assert list(measured.get_ydata()) == [4.6, 366] and measured.get_linewidth() == 0
    assert list(predicted.get_ydata()) == pytest.approx([4.14, 329.4]) and predicted.get_linestyle() == "--"
    assert list(switch.lines[0].get_ydata()) == pytest.approx([0.2, 0.2]) and switch.get_ylim()[0] == 0


def test_the_limit_of_open_files_is_raised_and_put_back():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = min(before[1] if before[1] > 0 else 300, 300)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (low - 10, before[1]))
        with many._files(100):
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > low - 10
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == low - 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
