"""The plan of the course: the lessons in order, with what each needs and builds.

The map in lessons/README.md, the head of each lesson and `minilora progress` are made from this table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lesson:
    """One lesson.

    minutes: to read it and to do its exercises.
    needs: the numbers of the lessons to do before.
    needs_model: whether it trains the real model, which must be pulled first.
    """

    number: int
    name: str  # of its notebook and of its exercises' notebook
    question: str
    minutes: int
    needs: tuple[int, ...]
    builds: str
    essential: bool
    needs_model: bool = False

    @property
    def head(self) -> str:
        """The line below a lesson's title."""
        *others, last = map(str, self.needs or ("",))
        before = f"lessons {', '.join(others)} and {last}" if others else f"lesson {last}" if last else ""
        needs = before or "Python and NumPy, matrix multiplication, derivatives"
        model = " It needs the real model: `minilora pull smollm2`, 98 MB." if self.needs_model else ""
        return f"*{self.minutes} minutes with the exercises. Before it: {needs}. You build: {self.builds}.*{model}"


WITH_MODEL = (18,)  # lessons that train the real model
LESSONS = {
    row[0]: Lesson(*row, needs_model=row[0] in WITH_MODEL)
    for row in [
        (1, "01_gradient", "Can a gradient be measured?", 30, (), "a check for any derivative", True),
        (2, "02_tape", "How does code differentiate itself?", 45, (1,), "an engine of 40 lines", True),
        (3, "03_adam", "What does Adam keep?", 40, (2,), "AdamW, and the loss of a classifier", False),
        (4, "04_attention", "What is looked up?", 45, (2,), "attention, with its backward pass", False),
        (5, "05_transformer", "What is in a transformer?", 45, (2,), "a Llama, counted to the last parameter", True),
        (7, "07_full_fine_tuning", "What does full fine-tuning cost?", 40, (2,), "a training loop", True),
        (8, "08_low_rank", "Is the update low rank?", 30, (7,), "the spectrum of an update", False),
        (9, "09_lora", "What is LoRA?", 50, (7,), "LoRA's layer, forward and backward", True),
        (10, "10_inject", "How is it put into a model?", 40, (9,), "injecting, merging, taking out again", True),
        (11, "11_how_do_you_know", "How do you know?", 45, (9,), "a claim of your own, with its verdict", False),
        (12, "12_choices", "What to choose: rank, alpha, targets?", 40, (3, 10, 11), "small sweeps", True),
        (13, "13_how_much_smaller", "How much smaller is it?", 40, (9,), "a budget of parameters and bytes", True),
        (14, "14_what_is_not_saved", "What is not saved?", 40, (13,), "a ledger of activations and matmuls", True),
        (
            16,
            "16_many_versions",
            "One base, many versions?",
            40,
            (10,),
            "one adapter from several, combinations, a mixed batch",
            True,
        ),
        (17, "17_limits", "Where does it fail?", 35, (3, 9), "tasks that need rank", True),
        (18, "18_for_real", "How do I do it for real?", 45, (12, 13), "an adapter of a real model", True),
        (19, "19_relatives", "Who are its relatives?", 40, (3, 8, 9), "DoRA and PiSSA, from their papers", False),
    ]
}

AFTERNOON = (1, 2, 7, 9, 10, 13, 18)  # what one afternoon holds
TERM = ((1, 2), (3, 4), (5,), (7, 8), (9,), (10, 11), (12,), (13, 14), (16, 17), (18, 19))  # lessons, week by week
