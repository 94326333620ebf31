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


WITH_MODEL = (15,)  # lessons that train the real model
LESSONS = {
    row[0]: Lesson(*row, needs_model=row[0] in WITH_MODEL)
    for row in [
        (1, "01_gradient", "Can a gradient be measured?", 30, (), "a check for any derivative", True),
        (2, "02_tape", "How does code differentiate itself?", 45, (1,), "an engine of 40 lines", True),
        (3, "03_adam", "What does Adam keep?", 40, (2,), "AdamW, and the loss of a classifier", False),
        (4, "04_attention", "What is looked up?", 45, (2,), "attention, with its backward pass", False),
        (5, "05_transformer", "What is in a transformer?", 45, (2,), "a Llama, counted to the last parameter", True),
        (6, "06_full_fine_tuning", "What does full fine-tuning cost?", 40, (2,), "a training loop", True),
        (7, "07_low_rank", "Is the update low rank?", 30, (6,), "the spectrum of an update", False),
        (8, "08_lora", "What is LoRA?", 50, (6,), "LoRA's layer, forward and backward", True),
        (9, "09_inject", "How is it put into a model?", 40, (8,), "injecting, merging, taking out again", True),
        (10, "10_choices", "What to choose: rank, alpha, targets?", 40, (9,), "small sweeps", True),
        (11, "11_how_much_smaller", "How much smaller is it?", 40, (8,), "a budget of parameters and bytes", True),
        (12, "12_what_is_not_saved", "What is not saved?", 40, (11,), "a ledger of activations and matmuls", True),
        (
            13,
            "13_many_versions",
            "One base, many versions?",
            40,
            (9,),
            "one adapter from several, combinations, a mixed batch",
            True,
        ),
        (14, "14_limits", "Where does it fail?", 35, (8,), "tasks that need rank", True),
        (15, "15_for_real", "How do I do it for real?", 45, (10, 11), "an adapter of a real model", True),
        (16, "16_relatives", "Who are its relatives?", 40, (3, 7, 8), "DoRA and PiSSA, from their papers", False),
        (18, "18_how_do_you_know", "How do you know?", 45, (10,), "a claim of your own, with its verdict", False),
    ]
}

AFTERNOON = (1, 2, 6, 8, 9, 11, 15)  # what one afternoon holds
TERM = ((1, 2), (3, 4), (5,), (6, 7), (8,), (9,), (10,), (11, 12), (13, 14), (15, 16), (18,))  # lessons, week by week
