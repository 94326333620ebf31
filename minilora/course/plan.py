"""The plan of the course: the lessons in order, with what each needs, builds and teaches.

The map in lessons/README.md, the tables in INSTRUCTORS.md, the head of each lesson, its slides and `minilora progress`
are made from this table.
"""

from __future__ import annotations

from dataclasses import dataclass

SESSION = 90  # minutes: no part of a lesson takes longer


@dataclass(frozen=True)
class Lesson:
    """One lesson.

    minutes: to read and run it, then for each of its exercises; `times` counts them, and a test compares. A lesson
        without exercises is only read and run, and expects nothing of its reader.
    needs: the numbers of the lessons to do before.
    needs_model: whether it trains the real model, which must be pulled first.
    """

    number: int
    name: str  # of its notebook and of its exercises' notebook
    question: str
    minutes: tuple[int, ...]
    needs: tuple[int, ...]
    builds: str
    essential: bool
    needs_model: bool = False

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """The minutes of a lesson that fits a session; of a longer one in two parts, as equal as exercises allow."""
        if sum(self.minutes) <= SESSION:
            return (self.minutes,)
        halves = [(self.minutes[:i], self.minutes[i:]) for i in range(1, len(self.minutes))]
        return min(halves, key=lambda parts: max(map(sum, parts)))

    @property
    def head(self) -> str:
        """The line below a lesson's title."""
        *others, last = map(str, self.needs or ("",))
        before = f"lessons {', '.join(others)} and {last}" if others else f"lesson {last}" if last else ""
        needs = before or ("Python and NumPy, matrix multiplication, derivatives" if self.minutes[1:] else "nothing")
        model = " It needs the real model: `minilora pull smollm2`, 98 MB." if self.needs_model else ""
        halves = f"; part two begins with exercise {self.number}.{len(self.parts[0])}" if len(self.parts) > 1 else ""
        solved = f" with the exercises, {self.minutes[0]} without{halves}" if len(self.minutes) > 1 else ""
        return f"*{sum(self.minutes)} minutes{solved}. Before it: {needs}. You build: {self.builds}.*{model}"


WITH_MODEL = (18,)  # lessons that train the real model
LESSONS = {
    row[0]: Lesson(*row, needs_model=row[0] in WITH_MODEL)
    for row in [
        (0, "00_what_can_lora_do", "What can LoRA do?", (22,), (), "an adapter that knows ten facts of yours", True),
        (1, "01_gradient", "Can a gradient be measured?", (30, 35, 20, 10), (), "a check for any derivative", True),
        (
            2,
            "02_tape",
            "How does code differentiate itself?",
            (35, 15, 55, 10, 25),
            (1,),
            "an engine of 40 lines",
            True,
        ),
        (3, "03_adam", "What does Adam keep?", (40, 20, 25), (2,), "AdamW, and the loss of a classifier", False),
        (4, "04_attention", "What is looked up?", (35, 10, 25, 20), (2,), "attention, with its backward pass", False),
        (
            5,
            "05_transformer",
            "What is in a transformer?",
            (35, 20, 20, 15),
            (2,),
            "a Llama, counted to the last parameter",
            True,
        ),
        (
            6,
            "06_what_the_model_reads",
            "What does the model read?",
            (45, 30, 20, 30),
            (2,),
            "ids, labels and batches of records",
            True,
        ),
        (
            7,
            "07_full_fine_tuning",
            "What does full fine-tuning cost?",
            (25, 15, 20, 30, 60),
            (2, 6),
            "a training loop",
            True,
        ),
        (8, "08_low_rank", "Is the update low rank?", (25, 15, 15, 15), (7,), "the spectrum of an update", False),
        (9, "09_lora", "What is LoRA?", (35, 10, 25, 15), (7,), "LoRA's layer, forward and backward", True),
        (
            10,
            "10_inject",
            "How is it put into a model?",
            (30, 15, 10, 25, 40),
            (9,),
            "injecting, merging, taking out again",
            True,
        ),
        (
            11,
            "11_how_do_you_know",
            "How do you know?",
            (30, 15, 15, 30),
            (9,),
            "a claim of your own, with its verdict",
            False,
        ),
        (
            12,
            "12_choices",
            "What to choose: rank, alpha, targets?",
            (30, 20, 20, 15),
            (3, 10, 11),
            "small sweeps",
            True,
        ),
        (
            13,
            "13_how_much_smaller",
            "How much smaller is it?",
            (35, 10, 15, 15),
            (9,),
            "a budget of parameters and bytes",
            True,
        ),
        (
            14,
            "14_what_is_not_saved",
            "What is not saved?",
            (40, 15, 20, 10),
            (13,),
            "a ledger of activations and matmuls",
            True,
        ),
        (
            15,
            "15_how_few_bits",
            "How few bits are enough?",
            (55, 15, 25, 25),
            (9, 13),
            "4-bit blocks, and QLoRA's backward pass",
            False,
        ),
        (
            16,
            "16_many_adapters",
            "One base, many adapters?",
            (35, 15, 20, 25),
            (10,),
            "one adapter from several, combinations, a mixed batch",
            True,
        ),
        (17, "17_limits", "Where does it fail?", (30, 10, 20, 20), (3, 9), "tasks that need rank", True),
        (18, "18_for_real", "How do I do it for real?", (35, 25, 30), (12, 13), "an adapter of a real model", True),
        (
            19,
            "19_relatives",
            "Who are its relatives?",
            (45, 20, 20, 20),
            (3, 8, 9),
            "DoRA and PiSSA, from their papers",
            False,
        ),
        (
            20,
            "20_what_differs",
            "What differs between models?",
            (30, 20, 15),
            (5,),
            "the backward pass of LayerNorm, and the base of a rotation",
            False,
        ),
        (
            21,
            "21_preferences",
            "Can it learn what people prefer?",
            (30, 20, 15, 30),
            (2, 6, 9),
            "DPO's loss, and a training with a frozen reference",
            False,
        ),
    ]
}

AFTERNOON = (0, 1, 2, 6, 7, 9, 10, 13, 18)  # lessons of one afternoon, without their exercises
TERM = (
    (1, 2),
    (3, 4),
    (5, 6),
    (7, 8),
    (9, 10),
    (11, 12),
    (13, 14),
    (15, 16),
    (17, 18),
    (19,),
    (20, 21),
)  # lessons by weeks

OUTCOMES = {  # by lesson, what you can do afterwards: each begins with a verb
    0: (
        "describe what LoRA changes in a model and what it leaves unchanged",
        "compare a model's answers before and after an adapter",
        "choose the lessons that answer your own question",
    ),
    1: (
        "measure any derivative by a central difference",
        "explain why neither the largest nor the smallest step is the best one",
        "test a gradient formula so that a wrong one is caught",
    ),
    2: (
        "derive a gradient by summing over the paths of a computation",
        "implement a tape with vector-Jacobian products",
        "count the matmuls that a frozen matrix saves in the backward pass",
    ),
    3: (
        "implement AdamW with bias correction and decoupled weight decay",
        "explain when a learning rate for each parameter helps, and when momentum does",
        "calculate the bytes that an optimizer stores per parameter",
    ),
    4: (
        "implement causal attention with grouped query heads",
        "derive the gradient of softmax",
        "test whether a model can see later tokens",
    ),
    5: (
        "count the parameters of a Llama from its config",
        "predict the loss of an untrained language model",
        "measure what a part of a model contributes by removing it",
    ),
    6: (
        "encode a conversation with a chat template",
        "build the mask of the tokens that are scored",
        "find a mask that is shifted by one token",
    ),
    7: (
        "implement a training loop that scores answers alone",
        "measure forgetting, and compare methods at equal loss on the new task",
        "calculate the memory of full fine-tuning",
    ),
    8: (
        "calculate the share of variance that the r largest singular values explain",
        "compare a spectrum with that of noise",
        "explain what low rank does and does not mean for an update",
    ),
    9: (
        "derive the gradients of A, B and x",
        "implement LoRA's forward and backward pass without an array of W's size",
        "explain why B is initialised to zero and A is not",
    ),
    10: (
        "implement injection into a tree of modules",
        "merge an adapter exactly, and restore the base bit for bit",
        "test an adapted model for mistakes that raise no error",
    ),
    11: (
        "state a claim as a quantity with a band before measuring",
        "calculate a paired confidence interval from a few seeds",
        "design a control that would change the verdict",
    ),
    12: (
        "measure the noise between seeds, and judge a difference by it",
        "tune a learning rate separately for each method",
        "choose rank, alpha and target modules for a budget of parameters",
    ),
    13: (
        "count an adapter's parameters for any shapes",
        "calculate the memory and the storage of LoRA and of full fine-tuning",
        "judge a published factor such as 10,000 by its width and rank",
    ),
    14: (
        "list the activations that each layer saves",
        "count the matmuls of a step with and without LoRA",
        "predict from which text length on activations dominate the memory",
    ),
    15: (
        "implement block-wise quantisation to 4 bits",
        "compare number formats by their error on real weights",
        "explain which parts of a QLoRA step are in 4 bits and which are not",
    ),
    16: (
        "implement a batch in which each row has its own adapter",
        "combine adapters without cross terms",
        "measure what an adapter does outside its own domain",
    ),
    17: (
        "calculate the smallest error that an adapter of rank r can reach",
        "construct a task that needs a given rank",
        "distinguish a lack of rank from a lack of steps",
    ),
    18: (
        "choose a configuration that fits a machine",
        "fine-tune a real model, evaluate it on unseen data and save the adapter",
        "decide between LoRA and full fine-tuning from measured values",
    ),
    19: (
        "implement DoRA's norm and PiSSA's initialisation",
        "explain for which optimizer each scale keeps the first step equal over ranks",
        "judge a comparison of methods by how the baseline was tuned",
    ),
    20: (
        "list the choices in which GPT-2, Llama, Qwen3 and Gemma 3 differ",
        "count where a model's parameters are, and what its KV cache stores for each token",
        "test whether a model works beyond the length that it was trained on",
    ),
    21: (
        "derive DPO's loss from a reward and a distance to the reference model",
        "implement the loss on pairs, with a reference that stays frozen",
        "measure what a preference run has changed, and what it has cost",
    ),
}
