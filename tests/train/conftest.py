"""What tests of jobs leave out: the picture of a run, and most of each answer.

`tests/test_cli.py` and `tests/pages` draw that picture; `tests/commands/test_eval.py` measures whole answers.
"""

from functools import partial

import pytest

from minilora.measure.recall import answer_all


@pytest.fixture(autouse=True, scope="module")
def no_picture_and_short_answers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.train.job.run_picture", lambda metrics, path: path.touch())
        patch.setattr("minilora.train.material.answer_all", partial(answer_all, max_new_tokens=8))
        yield
