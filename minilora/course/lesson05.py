"""Lesson 5's exercises: count a Llama, and derive the backward pass of its RMSNorm and of its gate by hand."""

from collections.abc import Callable
from unittest.mock import patch

import numpy as np

from ..nn.llama import Config, Llama
from .compare import Wrong
from .exercises import Draw, arrays, distinct_sizes, drawing, exercise, variant

# -- 5.1 counting ------------------------------------------------------------------------------------------------------


def draw_config(rng: np.random.Generator, tied: bool, wide: bool = False) -> Draw:
    """A Llama's shape. wide: its heads are wider than hidden_size / num_attention_heads."""
    H = int(rng.choice([6, 9]))
    D = int(rng.choice([6, 10]))
    return Draw(
        config=Config(
            vocab_size=int(rng.integers(500, 700)),
            hidden_size=H * D,
            intermediate_size=int(rng.choice([101, 103, 107, 109, 113])),  # primes: no product is another by chance
            num_hidden_layers=int(rng.integers(3, 6)),
            num_attention_heads=H,
            num_key_value_heads=3,
            head_dim=D + 4 if wide else D,
            tie_word_embeddings=tied,
        )
    )


def from_the_shape(answer: Callable, drawn: Draw, rng: np.random.Generator) -> None:
    """Refuse an answer that builds a model and counts its parameters."""
    with patch.object(Llama, "_build", autospec=True, side_effect=Llama._build) as built:
        answer(**drawn)
    if built.called:
        raise Wrong("right, but it builds a model: write the count as a formula of the sizes in config")


@exercise(
    "5.1",
    draw=[
        lambda rng: draw_config(rng, tied=True),
        lambda rng: draw_config(rng, tied=False),
        lambda rng: draw_config(rng, tied=True, wide=True),
    ],
    returns="the count",
    also=from_the_shape,
    tolerance=0,
)
def count_llama(config):
    """config: an ml.Config -> the number of parameters of the Llama that it describes"""
    V, C, F = config.vocab_size, config.hidden_size, config.intermediate_size
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    block = 2 * H * D * C + 2 * K * D * C + 3 * F * C + 2 * C
    tables = 1 if config.tie_word_embeddings else 2
    return tables * V * C + config.num_hidden_layers * block + C


variant(
    "count_llama",
    {
        'Try it on a model that you know from the lesson: `count_llama(ml.load("tiny")[0].config)`.': (
            "This model is no Llama: as in Qwen2, q_proj, k_proj and v_proj have biases, one number for each output."
        ),
        "of the Llama that it describes": "of the model that it describes",
        "+ 3 * F * C + 2 * C": "+ 3 * F * C + 2 * C + H * D + 2 * K * D",
    },
    "three of the matrices have biases, as in Qwen2",
    lines={
        "+ 2 * C -> + 2 * C + H * D + 2 * K * D": "H * D + 2 * K * D -> H * D + 2 * K * D",
        "you counted biases: a Llama's linear layers have none": "o_proj and the MLP have no biases here",
        "right, but it builds a model": "that is a Llama's count: three of the matrices have biases here",
    },
    also=None,
)


# -- 5.2 the norm ------------------------------------------------------------------------------------------------------


def draw_norm(rng: np.random.Generator, N: int | None = None) -> Draw:
    """x, g (N, C), w (C), and an eps large enough to be seen."""
    sizes = distinct_sizes("NC", rng) | ({} if N is None else {"N": N})
    drawn = arrays(rng, sizes, x="N C", w="C", g="N C")
    drawn["eps"] = float(rng.uniform(0.2, 0.5))
    return drawn


@exercise("5.2", draw=draw_norm, smallest=lambda rng: draw_norm(rng, N=1), returns="dx (N, C), dw (C)", by_hand=True)
def rms_norm_vjp(x, w, g, eps):
    """x (N, C), w (C), g (N, C) -> dx (N, C), dw (C)"""
    inv = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    gw = g * w
    dx = inv * (gw - x * inv**2 * (gw * x).mean(axis=-1, keepdims=True))
    dw = (g * x * inv).sum(axis=0)
    return dx, dw


variant(
    "rms_norm_vjp",
    {
        r"$$y = \frac{x}{\mathrm{rms}(x)}\,w": r"$$y = \frac{x}{\mathrm{rms}(x)}\,(1 + w)",
        "all tokens share `w`.": "all tokens share `w`, which Gemma stores as the difference from 1.",
        "gw = g * w": "gw = g * (1 + w)",
        "(g * x * w / np.sqrt": "(g * x * (1 + w) / np.sqrt",
    },
    "the factor is 1 + w, as in Gemma",
    lines={"times w, so": "times 1 + w, so", "receives g w": "receives g (1 + w)"},
)


# -- 5.3 the gate ------------------------------------------------------------------------------------------------------


GATE = dict.fromkeys(("gate", "up", "g"), "N F")


@exercise(
    "5.3",
    draw=drawing("NF", **GATE),
    smallest=drawing("NF", {"N": 1}, **GATE),
    returns="dgate (N, F), dup (N, F)",
    by_hand=True,
)
def swiglu_vjp(gate, up, g):
    """gate, up, g (N, F) -> dgate (N, F), dup (N, F)"""
    s = 1 / (1 + np.exp(-gate))
    dgate = g * up * (s + gate * s * (1 - s))
    dup = g * gate * s
    return dgate, dup


variant(
    "swiglu_vjp",
    {
        r"\mathrm{silu}(\mathit{gate})\,\mathit{up} \qquad\qquad \mathrm{silu}(z) = z\,\sigma(z)": (
            r"\sigma(\mathit{gate})\,\mathit{up}"
        ),
        "the product rule, twice.": "the product rule. (This is the first gate of its kind, GLU.)",
        "(s + gate * s * (1 - s))": "s * (1 - s)",
        "g * gate * s": "g * s",
    },
    "the gate is a sigmoid, not a SiLU",
    lines={
        "y is silu(gate) times up": "y is the sigmoid of gate, times up",
        "silu(gate)": "the sigmoid of gate",
        "silu(z) is z times the sigmoid, and you treated the sigmoid as constant: a term is missing": (
            "that is the sigmoid itself: its derivative is needed"
        ),
        "silu(z) is z times the sigmoid, and you treated the z in front as constant: a term is missing": (
            "the gate is the sigmoid alone, without z in front"
        ),
        "that multiplies with silu itself; what is needed is its derivative": "that is silu; this gate is a sigmoid",
        "silu bends smoothly": "the sigmoid bends smoothly",
    },
)
