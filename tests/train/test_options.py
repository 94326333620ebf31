"""The options of the jobs: defaults, and what they refuse."""

import pytest

from minilora.train.options import Options


@pytest.mark.parametrize(
    "change",
    [
        dict(method="dora"), dict(epochs=0), dict(epochs=float("nan")), dict(batch_size=0), dict(lr=0.0),
        dict(lr=float("inf")), dict(lr=-1.0), dict(steps=0), dict(max_length=7), dict(eval_records=0),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_mean_nothing_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Options(**change)


@pytest.mark.parametrize(
    ("change", "folder"),
    [({}, "runs/legal"), (dict(method="full"), "runs/legal-full"), (dict(data="a/b.jsonl"), "runs/b"),
     (dict(out="here"), "here")],
)  # fmt: skip
def test_results_go_where_the_data_say_unless_told(change, folder):
    assert Options(**change).folder.as_posix() == folder
