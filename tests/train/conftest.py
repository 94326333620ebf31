"""What tests of jobs leave out: the picture of a run, most of each answer, and most of what is general.

`tests/commands/test_eval.py` measures whole answers, and the whole set.
"""

from functools import partial

import pytest

from minilora.data.records import read_records
from minilora.measure.recall import answer_all

GENERAL = read_records("general")[:6]


@pytest.fixture(autouse=True, scope="module")
def few_to_measure(no_picture):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.train.material.answer_all", partial(answer_all, max_new_tokens=8))
        patch.setattr("minilora.train.material.read_records", lambda name, tokenizer: GENERAL)
        yield
