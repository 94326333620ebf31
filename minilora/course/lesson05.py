"""Lesson 5's exercises: count a Llama, and the gradients of its normalisation and of its gate by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..nn.llama import Config
from .exercises import Draw, arrays, distinct_sizes, exercise

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


def counted(
    width: Callable[[Config], int] = lambda c: c.head_dim,
    keys: Callable[[Config], int] = lambda c: c.num_key_value_heads,
    tables: Callable[[Config], int] = lambda c: 1 if c.tie_word_embeddings else 2,
    blocks: Callable[[Config], int] = lambda c: c.num_hidden_layers,
    block_norms: int = 2,
    last_norm: int = 1,
    attention: tuple[int, int] = (2, 2),
    mlp: int = 3,
    more: Callable[[Config], int] = lambda c: 0,
) -> Callable[[Config], int]:
    """A count in which some parts are counted in another way.

    attention: matrices of queries' width (q_proj, o_proj) and of keys' width (k_proj, v_proj).
    """

    def answer(config: Config) -> int:
        C, D = config.hidden_size, width(config)
        block = attention[0] * C * config.num_attention_heads * D + attention[1] * C * keys(config) * D
        block += mlp * C * config.intermediate_size + block_norms * C
        return tables(config) * config.vocab_size * C + blocks(config) * block + last_norm * C + more(config)

    return answer


@exercise(
    "5.1",
    draw=[
        lambda rng: draw_config(rng, tied=True),
        lambda rng: draw_config(rng, tied=False),
        lambda rng: draw_config(rng, tied=True, wide=True),
    ],
    returns="the count",
    tolerance=0,
    decisive=["2 * H * D * C + 2 * K * D * C + 3 * F * C + 2 * C"],
    mistakes={
        "tied twice": (
            counted(tables=lambda c: 2),
            "the embedding is counted twice: where tie_word_embeddings is true, input and output share one table",
        ),
        "never a head": (
            counted(tables=lambda c: 1),
            "the head is missing: where tie_word_embeddings is false, the output has a table of its own",
        ),
        "no embedding": (
            counted(tables=lambda c: 0 if c.tie_word_embeddings else 1),
            "the embedding is missing: V rows of C numbers",
        ),
        "full keys": (
            counted(keys=lambda c: c.num_attention_heads),
            "k_proj and v_proj are narrower than q_proj: they have num_key_value_heads heads",
        ),
        "one key head": (counted(keys=lambda c: 1), "k_proj and v_proj have num_key_value_heads heads, not one"),
        "C / H": (
            counted(width=lambda c: c.hidden_size // c.num_attention_heads),
            "a head is config.head_dim wide, which need not be hidden_size / num_attention_heads",
        ),
        "no norms": (
            counted(block_norms=0, last_norm=0),
            "the norms are missing: two in each block and one at the end, C numbers each",
        ),
        "no last norm": (counted(last_norm=0), "the last norm is missing: C numbers before the output"),
        "one norm": (counted(block_norms=1), "each block has two norms: one before attention, one before the MLP"),
        "no block norms": (counted(block_norms=0), "the norms of the blocks are missing: two in each"),
        "no gate": (counted(mlp=2), "an MLP has three matrices: gate_proj, up_proj and down_proj; you counted two"),
        "no o_proj": (
            counted(attention=(1, 2)),
            "attention has four matrices: q_proj, k_proj, v_proj and o_proj; o_proj is missing",
        ),
        "k or v": (
            counted(attention=(2, 1)),
            "attention has four matrices: k_proj and v_proj are two, and you counted one of them",
        ),
        "one block": (counted(blocks=lambda c: 1), "that is one block: there are num_hidden_layers"),
        "biases": (
            counted(
                more=lambda c: (
                    c.num_hidden_layers
                    * (
                        c.num_attention_heads * c.head_dim
                        + 2 * c.num_key_value_heads * c.head_dim
                        + 2 * c.hidden_size
                        + 2 * c.intermediate_size
                    )
                )
            ),
            "you counted biases: a Llama's linear layers have none",
        ),
    },
)
def count_llama(config: Config) -> int:
    """The number of parameters of a Llama with this shape."""
    return counted()(config)


# -- 5.2 the norm ------------------------------------------------------------------------------------------------------


def draw_norm(rng: np.random.Generator, N: int | None = None) -> Draw:
    """x, g (N, C), w (C), and an eps large enough to be seen."""
    sizes = distinct_sizes("NC", rng) | ({} if N is None else {"N": N})
    drawn = arrays(rng, sizes, x="N C", w="C", g="N C")
    drawn["eps"] = float(rng.uniform(0.2, 0.5))
    return drawn


def norm_back(
    first: Callable[..., Any] = lambda g, w: g * w,
    along: Callable[..., Any] = lambda gw, x: (gw * x).mean(axis=-1, keepdims=True),
    power: int = 2,
    inverse: Callable[..., Any] = lambda x, eps: 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps),
    dw: Callable[..., Any] = lambda g, x, inv: (g * x * inv).sum(axis=0),
) -> Callable:
    """dx and dw, with some part made in another way."""

    def answer(x: Any, w: Any, g: Any, eps: float) -> Any:
        inv, gw = inverse(x, eps), first(g, w)
        return inv * (gw - x * inv**power * along(gw, x)), dw(g, x, inv)

    return answer


@exercise(
    "5.2",
    draw=draw_norm,
    smallest=lambda rng: draw_norm(rng, N=1),
    returns="dx (N, C), dw (C)",
    by_hand=True,
    decisive=["dx = inv * (gw - x * inv**2 * (gw * x).mean(axis=-1, keepdims=True))"],
    mistakes={
        "one way": (
            norm_back(along=lambda gw, x: 0),
            "dx: x is used twice, in the numerator and in rms(x): the way through rms(x) is missing",
        ),
        "no w": (norm_back(first=lambda g, w: g), "dx: w is missing: y is x / rms(x) times w, so g reaches x as g w"),
        "sum": (
            norm_back(along=lambda gw, x: (gw * x).sum(axis=-1, keepdims=True)),
            "dx: rms(x) holds a mean over C numbers, so its gradient has a 1 / C",
        ),
        "power": (
            norm_back(power=1),
            "dx: 1 / rms(x) is a power of -1/2: its derivative has rms(x) to the third, one factor is missing",
        ),
        "no factor": (
            norm_back(power=0),
            "dx: the way through rms(x) needs rms(x) to the third below it: two factors are missing",
        ),
        "added": (
            norm_back(along=lambda gw, x: -(gw * x).mean(axis=-1, keepdims=True)),
            "dx: the way through rms(x) has a minus: a longer x makes everything smaller",
        ),
        "eps": (
            norm_back(inverse=lambda x, eps: 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True))),
            "eps is missing: rms(x) = sqrt(mean(x²) + eps)",
        ),
        "eps outside": (
            norm_back(inverse=lambda x, eps: 1 / (np.sqrt((x * x).mean(axis=-1, keepdims=True)) + eps)),
            "eps stands inside the root: rms(x) = sqrt(mean(x²) + eps)",
        ),
        "length": (
            norm_back(
                along=lambda gw, x: (gw * x).sum(axis=-1, keepdims=True),
                inverse=lambda x, eps: 1 / np.sqrt((x * x).sum(axis=-1, keepdims=True) + eps),
            ),
            "rms(x) holds the mean of x², not the sum",
        ),
        "columns": (
            norm_back(inverse=lambda x, eps: 1 / np.sqrt((x * x).mean(axis=0, keepdims=True) + eps)),
            "wrong axis: every token, that is every row, is divided by its own rms",
        ),
        "rows of dw": (
            norm_back(dw=lambda g, x, inv: g * x * inv),
            "dw has one row per token: add them up, all tokens use the same w",
        ),
        "dw of x": (
            norm_back(dw=lambda g, x, inv: (g * x).sum(axis=0)),
            "dw: w is multiplied by x / rms(x), and you took x",
        ),
        "mean of dw": (
            norm_back(dw=lambda g, x, inv: (g * x * inv).mean(axis=0)),
            "dw: add up over the tokens, no mean: where the loss is a mean, g has that",
        ),
        "swapped": (
            lambda *a: rms_norm_vjp(*a)[::-1],
            "dx and dw are swapped: `return dx, dw`, in this order",
        ),
    },
)
def rms_norm_vjp(x: Any, w: Any, g: Any, eps: float) -> Any:
    """The gradients of x / rms(x) · w."""
    return norm_back()(x, w, g, eps)


# -- 5.3 the gate ------------------------------------------------------------------------------------------------------


def draw_gate(rng: np.random.Generator, N: int | None = None) -> Draw:
    """Gate and up projections of a few tokens."""
    sizes = distinct_sizes("NF", rng) | ({} if N is None else {"N": N})
    return arrays(rng, sizes, gate="N F", up="N F", g="N F")


def sigmoid(z: Any) -> Any:
    """1 / (1 + e ** -z)."""
    return 1 / (1 + np.exp(-z))


def gate_back(
    slope: Callable[[Any], Any] = lambda z: sigmoid(z) * (1 + z * (1 - sigmoid(z))),
    open_: Callable[[Any], Any] = lambda z: z * sigmoid(z),
    times: Callable[[Any], Any] = lambda up: up,
) -> Callable:
    """dgate and dup, with another derivative of silu, another silu, or another factor beside the derivative."""

    def answer(gate: Any, up: Any, g: Any) -> Any:
        return g * times(up) * slope(gate), g * open_(gate)

    return answer


@exercise(
    "5.3",
    draw=draw_gate,
    smallest=lambda rng: draw_gate(rng, N=1),
    returns="dgate (N, F), dup (N, F)",
    by_hand=True,
    decisive=["dgate = g * up * (s + gate * s * (1 - s))"],
    mistakes={
        "sigmoid's": (
            gate_back(slope=lambda z: sigmoid(z) * (1 - sigmoid(z))),
            "dgate: that is the derivative of the sigmoid; silu(z) is z times the sigmoid, a product of two",
        ),
        "first term": (
            gate_back(slope=sigmoid),
            "dgate: silu(z) is z times the sigmoid, and you treated the sigmoid as constant: a term is missing",
        ),
        "second term": (
            gate_back(slope=lambda z: z * sigmoid(z) * (1 - sigmoid(z))),
            "dgate: silu(z) is z times the sigmoid, and you treated the z in front as constant: a term is missing",
        ),
        "sign": (
            gate_back(slope=lambda z: sigmoid(z) * (1 - z * (1 - sigmoid(z)))),
            "dgate: the second term has a plus: the sigmoid grows with z",
        ),
        "no up": (gate_back(times=lambda up: 1), "dgate: the factor up is missing: y is silu(gate) times up"),
        "value": (
            gate_back(slope=lambda z: z * sigmoid(z)),
            "dgate: that multiplies with silu itself; what is needed is its derivative",
        ),
        "relu": (
            gate_back(slope=lambda z: (z > 0) * 1.0),
            "dgate: that is the derivative of ReLU; silu bends smoothly",
        ),
        "dup of gate": (
            gate_back(open_=lambda z: z),
            "dup: up is multiplied by silu(gate), and you took gate",
        ),
        "dup of sigmoid": (
            gate_back(open_=sigmoid),
            "dup: up is multiplied by silu(gate) = gate times its sigmoid, and you took the sigmoid",
        ),
        "dup of up": (
            lambda gate, up, g: (swiglu_vjp(gate, up, g)[0], g * up),
            "dup: a product gives each factor the other one: dup is made with silu(gate), not with up",
        ),
        "swapped": (
            lambda *a: swiglu_vjp(*a)[::-1],
            "dgate and dup are swapped: `return dgate, dup`, in this order",
        ),
    },
)
def swiglu_vjp(gate: Any, up: Any, g: Any) -> Any:
    """The gradients of silu(gate) · up."""
    return gate_back()(gate, up, g)
