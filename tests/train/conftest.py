"""What tests of jobs leave out: the picture of a run, and most of each answer.

`tests/commands/test_eval.py` measures whole answers.
"""

from functools import partial

import pytest

from minilora.measure.recall import answer_all


@pytest.fixture(autouse=True, scope="module")
def answers_of_few_tokens(no_picture):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.train.material.answer_all", partial(answer_all, max_new_tokens=8))
        yield
