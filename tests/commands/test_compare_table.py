"""The table of the introductions: what each row says, and when a claim has held."""

import pytest
from comparing import MEMORY, metrics, result

from minilora.commands.compare_table import CLAIMS, HELD, IN_PART, NOT, SHOWN, page, rows


def found(what, **runs):
    (row,) = [row for row in rows(result(**runs)) if row.what == what]
    return row


def test_every_claim_has_a_row_and_the_numbers_are_those_of_the_runs():
    table = rows(result())
    assert list(dict.fromkeys(row.claim for row in table)) == list(CLAIMS)
    assert {row.what: (row.lora, row.full) for row in table if row.claim not in ("learns", "untouched")} == {
        "trainable parameters": (2_442_240, 134_515_008),
        "weights and adapter": (547_828_992, 538_060_032),
        "gradients": (9_768_960, 538_060_032),
        "optimizer state": (19_537_920, 1_076_120_064),
        "activations": (454_000_000, 440_000_000),
        "scratch, program, libraries": (89_100_000, 301_700_000),
        "peak of a step, predicted": tuple(sum(MEMORY[method].values()) for method in ("lora", "full")),
        "peak of the process": tuple(sum(MEMORY[m].values()) + 50_000_000 for m in ("lora", "full")),
        "one step": (1.5, 2.8),
        "to its best validation loss": (1.5 * 40, 2.8 * 60),
        "to 2.900, which both reach": (1.5 * 40, 2.8 * 40),
        "training of the run": (pytest.approx(90 * 2 / 3600 * 0.05), pytest.approx(168 * 2 / 3600 * 0.05)),
        "adapter or model on disk": (9_768_960, 538_060_032),
    }
    learned = {row.what: (row.base, row.lora, row.full) for row in table if row.claim in ("learns", "untouched")}
    assert learned == {
        "loss, paraphrased questions": (3.6, 1.6, 1.5),
        "loss, unseen questions": (3.5, 2.9, 2.9),
        "recall, paraphrased questions": (0.1, 0.3, 0.3),
        "recall, unseen questions": (0.14, 0.22, 0.22),
        "the base's weights": (None, "unchanged", "changed"),
        "loss on general text": (3.3, 3.4, 3.4),
    }


def test_the_loss_that_both_reach_is_that_of_the_worse():
    row = found("to 2.900, which both reach", lora=metrics(losses=(3.2, 2.9, 2.7)), full=metrics("full"))
    assert (row.lora, row.full) == (1.5 * 40, 1.5 * 40)


@pytest.mark.parametrize(
    ("share", "few", "low"),
    [(0.1, HELD, HELD), (0.11, IN_PART, HELD), (0.33, IN_PART, HELD), (0.34, IN_PART, IN_PART), (0.5, IN_PART, IN_PART),
     (0.51, NOT, IN_PART), (0.9, NOT, IN_PART), (0.91, NOT, NOT), (1.2, NOT, NOT)],
)  # fmt: skip
def test_a_cost_is_low_up_to_a_third_and_few_are_up_to_a_tenth(share, few, low):
    full = metrics("full", trainable_parameters=1000, adapter_bytes=1000, seconds_per_step=1000.0)
    cost = 1000 * share
    lora = metrics(trainable_parameters=cost, adapter_bytes=cost, seconds_per_step=cost)
    assert found("trainable parameters", lora=lora, full=full).verdict == few
    assert found("adapter or model on disk", lora=lora, full=full).verdict == few
    assert found("one step", lora=lora, full=full).verdict == low
    assert found("one step", lora=lora, full=full).ratio == pytest.approx(share)


LOSS, RECALL, GENERAL = ("loss", "unseen", 3.0), ("keyword_recall", "unseen", 0.1), ("loss", "general", 3.0)
CHANGES = [  # measure, set and value before, LoRA's after, that of full fine-tuning, verdict, ratio of the changes
    (*LOSS, 1.05, 1.0, HELD, 0.975),
    (*LOSS, 1.2, 1.0, IN_PART, 0.9),
    (*LOSS, 1.5, 1.0, NOT, 0.75),
    (*LOSS, 0.5, 1.0, HELD, 1.25),
    (*LOSS, 3.0, 3.0, NOT, None),  # neither has learned anything
    (*LOSS, 2.9, 3.2, HELD, -0.5),
    (*LOSS, 3.1, 3.2, NOT, 0.5),
    (*RECALL, 0.3, 0.31, HELD, 0.2 / 0.21),  # more is better
    (*RECALL, 0.3, 0.34, IN_PART, 0.2 / 0.24),
    (*RECALL, 0.1, 0.1, NOT, None),
    (*GENERAL, 3.0, 3.5, HELD, 0.0),  # LoRA forgets less if it forgets at most half
    (*GENERAL, 3.1, 3.2, HELD, 0.5),
    (*GENERAL, 3.15, 3.2, IN_PART, 0.75),
    (*GENERAL, 3.2, 3.2, NOT, 1.0),
    (*GENERAL, 3.1, 3.0, NOT, None),
]
ROWS = {LOSS: "loss, unseen questions", RECALL: "recall, unseen questions", GENERAL: "loss on general text"}


@pytest.mark.parametrize(("measure", "of", "before", "lora", "full", "verdict", "ratio"), CHANGES)
def test_the_change_beside_that_of_full_fine_tuning_decides(measure, of, before, lora, full, verdict, ratio):
    sets = [{measure: {"general": [3.3, 3.3]} | {of: [before, after]}} for after in (lora, full)]
    row = found(ROWS[measure, of, before], lora=metrics(**sets[0]), full=metrics("full", **sets[1]))
    assert row.verdict == verdict and row.ratio == (None if ratio is None else pytest.approx(ratio))


def test_a_base_that_moved_under_lora_is_said():
    row = found("the base's weights", lora=metrics(base_sha256=["a" * 64, "c" * 64]))
    assert (row.verdict, row.lora) == (NOT, "changed")


def test_without_keywords_paraphrases_and_a_known_peak_the_table_is_shorter():
    bare = {"loss": {"general": [3.0, 3.1]}, "keyword_recall": {}}
    short = result(metrics(**bare), metrics("full", **bare), peak_bytes={"lora": None, "full": None})
    assert {row.what for row in rows(result())} - {row.what for row in rows(short)} == {
        "peak of the process", "loss, paraphrased questions", "loss, unseen questions",
        "recall, paraphrased questions", "recall, unseen questions",
    }  # fmt: skip
    assert page(short)


@pytest.mark.parametrize("digits", [*range(-7, 8)])
def test_a_price_is_right_to_two_digits_without_an_exponent(digits):
    price = 1.64 * 10.0**digits
    shown = SHOWN["dollars"](price).removeprefix("$")
    assert "e" not in shown and float(shown.replace(",", "")) == pytest.approx(price, rel=0.03)
    assert len(shown.replace(".", "").replace(",", "").lstrip("0")) == max(2, digits + 1)
    assert SHOWN["dollars"](0) == "$0"


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [100, 93, 80])
def test_the_page_has_every_claim_and_row_in_the_columns_there_are(width):
    text = page(result(), width)
    assert max(map(len, text.split("\n"))) <= width
    assert [claim for claim in CLAIMS.values() if claim not in text] == []
    assert [row.what for row in rows(result()) if row.what not in text] == []
    lines = [" ".join(line.split()) for line in text.split("\n")]
    for line in (
        "trainable parameters 2,442,240 134,515,008 0.018 held",
        "activations 454 MB 440 MB 1.03 not held",
        "peak of a step, predicted 1,120 MB 2,454 MB 0.46 in part",
        "to its best validation loss 1.0 minutes 2.8 minutes 0.36 in part",
        "training of the run $0.0025 $0.0047 0.54 in part",
        "loss, paraphrased questions 3.600 1.600 1.500 0.95 held",
        "recall, paraphrased questions 10.0 % 30.0 % 30.0 % 1.00 held",
        "the base's weights unchanged changed held",
    ):
        assert line in lines


def test_the_page_gives_a_reason_for_every_claim_that_did_not_hold_in_all_its_rows_and_for_no_other():
    reasons = page(result()).partition("only in part ---")[2].partition("-- how it was")[0]
    assert [line.partition(":")[0] for line in reasons.split("\n") if line[:1].isalpha()] == [
        "Memory", "Speed", "Money", "Forgetting"
    ]  # fmt: skip
    text = " ".join(reasons.split())
    assert "from 1,614 MB to 29.3 MB" in text and "is 1.87 times as fast" in text


def test_the_page_says_how_the_learning_rates_were_chosen():
    search = {
        "lora": {"best": 0.02, "tried": [[0.002, 3.1], [0.02, 3.0], [0.2, None]], "added": [0.2], "at_edge": False},
        "full": {"best": 2e-4, "tried": [[2e-5, 3.1], [2e-4, 3.0]], "added": [], "at_edge": True},
    }
    text = " ".join(page(result(search=search)).split())
    assert "LoRA: 0.02, by the validation loss after 24 steps (0.002: 3.100, 0.02: 3.000, 0.2: diverged)." in text
    assert "extended by one" in text and "(--full-lr)" in text and "(--lora-lr)" not in text
    given = {method: {"best": 0.01, "tried": [], "added": [], "at_edge": False} for method in ("lora", "full")}
    assert "Learning rate of full fine-tuning: 0.01, as given." in page(result(search=given))
