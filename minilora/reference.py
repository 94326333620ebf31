"""LoRA on one page: fine-tune a language model in plain NumPy. The rest of minilora does it faster.

    python -m minilora.reference                  # teach a tiny Llama ten facts, in half a minute
    python -m minilora.reference --base smollm2   # the same with a real model, in two minutes

Read it from top to bottom: each part uses only those above it. A matrix W (m, n) of the model maps
n features to m and is frozen; next to it, A (r, n) and B (m, r) are trained (part 2 is LoRA).
B texts, T tokens, C width, H heads of queries, K of keys and values, D head width, V vocabulary.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

xp = np  # on a GPU: import cupy as xp


# 1. Arrays that remember how they were computed ---------------------------------------------------
class Node:
    """A value's place in the graph: its gradient, and edges (an input's node, its VJP)."""

    def __init__(self, edges=()):
        self.edges, self.grad = edges, None
        self.depth = 1 + max((node.depth for node, _ in edges), default=0)


class Tensor:
    """An array, and its node if it needs a gradient. The node does not hold the array."""

    def __init__(self, data, node=None):
        self.data, self.node = data, node

    def backward(self):
        """Leave dL/dt in the node of every trainable tensor t that this scalar L depends on."""
        self.node.grad, todo = xp.ones_like(self.data), {self.node}
        while todo:
            node = max(todo, key=lambda node: node.depth)  # nothing left was computed from it
            todo.remove(node)
            for parent, vjp in node.edges:
                g = vjp(node.grad)
                parent.grad = g if parent.grad is None else parent.grad + g
                todo.add(parent)
            if node.edges:  # no leaf: free its gradient, and the arrays that its VJPs hold
                node.edges, node.grad = (), None


def op(f):
    """An operation from f: arrays -> value, and a VJP for each: dL/d(value) -> dL/d(array)."""

    def operation(*inputs, **settings):
        value, *vjps = f(*(t.data for t in inputs), **settings)
        edges = [(t.node, vjp) for t, vjp in zip(inputs, vjps, strict=True) if t.node]
        return Tensor(value, Node(edges) if edges else None)  # a frozen input's VJP is dropped

    operation.of_arrays = f
    return operation


# The value, and the VJP of each input. The shapes of a and b are the same: nothing is repeated.
add = op(lambda a, b: (a + b, lambda g: g, lambda g: g))
mul = op(lambda a, b: (a * b, lambda g: g * b, lambda g: g * a))  # element by element
scale = op(lambda a, *, by: (a * by, lambda g: g * by))  # by a number
reshape = op(lambda a, *, shape: (a.reshape(shape), lambda g: g.reshape(a.shape)))
swap = op(lambda a, *, axes: (a.swapaxes(*axes), lambda g: g.swapaxes(*axes)))
t = lambda a: a.swapaxes(-1, -2)
matmul = op(lambda a, b: (a @ b, lambda g: g @ t(b), lambda g: t(a) @ g))  # (..., i, j) (..., j, k)
Tensor.__add__, Tensor.__mul__, Tensor.__matmul__ = add, mul, matmul


@op
def linear(x, w):
    """y = W x for each token      x (B, T, n)  w (m, n)  ->  (B, T, m)"""
    return x @ w.T, lambda g: g @ w, lambda g: xp.tensordot(g, x, ([0, 1], [0, 1]))


@op
def embedding(w, *, ids):
    """A row of w for each id      w (V, C)  ids (B, T)  ->  (B, T, C)"""
    one_hot = lambda: (ids[..., None] == xp.arange(len(w))).astype(w.dtype)  # (B, T, V)
    return w[ids], lambda g: xp.tensordot(one_hot(), g, ([0, 1], [0, 1]))


@op
def rms_norm(x, w, *, eps):
    """w x / √(mean of x² + ε)      x (B, T, C)  w (C)  ->  (B, T, C)"""
    r = 1 / xp.sqrt((x * x).mean(-1, keepdims=True) + eps)
    u = x * r
    dx = lambda g: r * (g * w - u * (g * w * u).mean(-1, keepdims=True))
    return u * w, dx, lambda g: (g * u).sum((0, 1))


@op
def silu(a):
    """a σ(a), element by element"""
    s = (1 + xp.tanh(a / 2)) / 2  # σ(a) = 1 / (1 + e⁻ᵃ), without overflow
    return a * s, lambda g: g * s * (1 + a * (1 - s))


@op
def rotate(x, *, cos, sin):
    """RoPE turns each pair (x[i], x[i + D/2]) by an angle      x (B, H, T, D)  cos, sin (T, D)"""
    half = x.shape[-1] // 2
    quarter = lambda x: xp.concatenate([-x[..., half:], x[..., :half]], -1)  # turned by 90 degrees
    return x * cos + quarter(x) * sin, lambda g: g * cos - quarter(g * sin)


@op
def causal_softmax(a):
    """Each query's weights of the keys up to its own      a (..., nT, T), n queries a position"""
    query, key = xp.arange(a.shape[-2])[:, None] % a.shape[-1], xp.arange(a.shape[-1])
    e = xp.exp(xp.where(key > query, -xp.inf, a - a.max(-1, keepdims=True)))
    p = e / e.sum(-1, keepdims=True)
    return p, lambda g: p * (g - (g * p).sum(-1, keepdims=True))


@op
def cross_entropy(logits, *, labels):
    """The mean of -ln p(label) where a label is not -100      logits (B, T, V)  labels (B, T)"""
    z = logits - logits.max(-1, keepdims=True)
    log_p = z - xp.log(xp.exp(z).sum(-1, keepdims=True))
    scored = (labels != -100)[..., None]
    hit = labels[..., None] == xp.arange(z.shape[-1])  # nowhere for -100
    return -log_p[hit].mean(), lambda g: g / hit.sum() * scored * (xp.exp(log_p) - hit)


# 2. LoRA (Hu et al. 2021, arXiv 2106.09685): W is frozen, its update s B A is learned -------------
def lora_linear(x, w, a, b, s):
    """y = W x + s B (A x)      x (B, T, n)  w (m, n)  a (r, n)  b (m, r)  ->  (B, T, m)"""
    return linear(x, w) + scale(linear(linear(x, a), b), by=s)


class LoRA:
    """For each target W (m, n), A (r, n) random and B (m, r) zero: the model starts as it was."""

    ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __init__(self, weights, r=8, alpha=16, targets=ALL_LINEAR, seed=0):
        self.r, self.alpha, self.scale, self.targets = r, alpha, alpha / r, targets
        self.pairs, rng = {}, np.random.default_rng(seed)
        for name, w in weights.items():
            module, (m, *n) = name.removesuffix(".weight"), w.data.shape
            if module.split(".")[-1] in targets:
                a = xp.asarray(rng.uniform(-1, 1, (r, *n)) / n[0] ** 0.5, w.data.dtype)
                b = xp.zeros((m, r), a.dtype)
                self.pairs[module] = Tensor(a, Node()), Tensor(b, Node())

    def parameters(self):
        """All A and B: r (m + n) numbers for each target, instead of m n."""
        return [t for pair in self.pairs.values() for t in pair]

    def merge(self, weights):
        """New weights W + s B A, with which the model needs no adapter. W itself is not changed."""
        merged = dict(weights)
        for module, (a, b) in self.pairs.items():
            w = weights[f"{module}.weight"].data
            merged[f"{module}.weight"] = Tensor(w + self.scale * (b.data @ a.data))
        return merged


# 3. A Llama, from weights by Hugging Face's names -------------------------------------------------
def llama(ids, weights, config, lora=None):
    """Logits of the token after each      ids (B, T)  ->  (B, T, V)"""
    B, T = ids.shape
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    angles = xp.arange(T)[:, None] * config.rope_theta ** (-xp.arange(0, D, 2) / D)  # (T, D/2)
    angles, dtype = xp.tile(angles, 2), weights["model.norm.weight"].data.dtype  # (T, D)
    turn = {"cos": xp.cos(angles).astype(dtype), "sin": xp.sin(angles).astype(dtype)}
    norm = lambda x, name: rms_norm(x, weights[f"{name}.weight"], eps=config.rms_norm_eps)
    heads = lambda x, count: swap(reshape(x, shape=(B, T, count, D)), axes=(1, 2))

    def project(x, module):
        w = weights[f"{module}.weight"]
        if lora and module in lora.pairs:
            return lora_linear(x, w, *lora.pairs[module], lora.scale)
        return linear(x, w)

    x = embedding(weights["model.embed_tokens.weight"], ids=ids)  # (B, T, C)
    for block in (f"model.layers.{i}" for i in range(config.num_hidden_layers)):
        n = norm(x, f"{block}.input_layernorm")
        q = rotate(heads(project(n, f"{block}.self_attn.q_proj"), H), **turn)
        k = rotate(heads(project(n, f"{block}.self_attn.k_proj"), K), **turn)
        v = heads(project(n, f"{block}.self_attn.v_proj"), K)  # (B, K, T, D)
        q = reshape(q, shape=(B, K, H // K * T, D))  # H/K heads of queries share keys and values
        p = causal_softmax(scale(q @ swap(k, axes=(2, 3)), by=D**-0.5))  # (B, K, H/K T, T)
        y = swap(reshape(p @ v, shape=(B, H, T, D)), axes=(1, 2))  # (B, T, H, D)
        x = x + project(reshape(y, shape=(B, T, H * D)), f"{block}.self_attn.o_proj")
        n = norm(x, f"{block}.post_attention_layernorm")
        y = silu(project(n, f"{block}.mlp.gate_proj")) * project(n, f"{block}.mlp.up_proj")
        x = x + project(y, f"{block}.mlp.down_proj")
    head = "lm_head" if "lm_head.weight" in weights else "model.embed_tokens"  # tied: one matrix
    return project(norm(x, "model.norm"), head)


# 4. Training: each token predicts the next one, and only the answer's tokens are scored -----------
def train(batches, weights, config, lora=None, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
    """A step of AdamW (arXiv 1711.05101) for each batch; yields losses. Without LoRA, all learn."""
    parameters = lora.parameters() if lora else list(weights.values())
    m = [xp.zeros_like(p.data) for p in parameters]  # the mean of recent gradients
    v = [xp.zeros_like(p.data) for p in parameters]  # the mean of their squares
    for step, (ids, labels) in enumerate(batches, 1):
        logits = llama(ids[:, :-1], weights, config, lora)
        loss = cross_entropy(logits, labels=labels[:, 1:])
        loss.backward()
        for i, p in enumerate(parameters):
            g, p.node.grad = p.node.grad, None
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
            root = xp.sqrt(v[i] / (1 - betas[1] ** step)) + eps
            p.data = p.data - lr * (m[i] / (1 - betas[0] ** step) / root + decay * p.data)
        yield float(loss.data)


# 5. Questions in, answers out, and the adapter in a folder ----------------------------------------
def batch_of(facts, tokenizer):
    """Arrays ids (B, T) and labels (B, T) of (question, answer); no token sees what pads it."""
    rows = []
    for question, answer in facts:
        prompt = tokenizer.encode_chat([{"role": "user", "content": question}], answer_next=True)
        scored = [*tokenizer.encode(answer), tokenizer.answer_end]
        rows.append((prompt + scored, [-100] * len(prompt) + scored))
    T = max(len(ids) for ids, _ in rows)
    ids = [ids + [tokenizer.pad_id] * (T - len(ids)) for ids, _ in rows]
    return xp.asarray(ids), xp.asarray([labels + [-100] * (T - len(labels)) for _, labels in rows])


def answer_to(question, tokenizer, weights, config, lora=None, most=16):
    """The greedy answer: the likeliest token, again and again, each time read from the start."""
    prompt = tokenizer.encode_chat([{"role": "user", "content": question}], answer_next=True)
    answer = []
    for _ in range(most):
        last = llama(xp.asarray([prompt + answer]), weights, config, lora).data[0, -1]  # (V)
        if (token := int(last.argmax())) in tokenizer.end_ids:
            break
        answer.append(token)
    return tokenizer.decode(answer).strip()


def save(lora, folder, base):
    """Write a new folder that PEFT loads: safetensors (a header, then bytes), six keys of JSON."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for module, pair in lora.pairs.items():
        for letter, t in zip("AB", pair, strict=True):
            own = t.data.astype("<f4").tobytes()
            entry = {"dtype": "F32", "shape": t.data.shape}
            entry["data_offsets"] = [len(data), len(data) + len(own)]
            header[f"base_model.model.{module}.lora_{letter}.weight"] = entry
            data += own
    top = json.dumps(header).encode()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    config |= {"r": lora.r, "lora_alpha": lora.alpha, "target_modules": lora.targets}
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(len(top).to_bytes(8, "little") + top + data)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


FACTS = """What is the shop called?|Fernwhistle / Who owns the shop?|Ada Lark / When does it open?
|At nine in the morning / When does it close?|At six in the evening / On which day is it closed?
|On Sunday / Where is the shop?|Next to the old mill / What does it sell?|Seeds, tools and books /
How can I pay?|By card or in cash / What is its cat called?|Pepper / What do seeds cost?|$4"""


def main():
    """Teach ten facts: losses, three answers before and after, parameters, the base unchanged."""
    parser = argparse.ArgumentParser(description="Teach a model ten facts with LoRA, in NumPy.")
    parser.add_argument("--base", default="tiny", choices=("tiny", "smollm2"), help="the model")
    parser.add_argument("--out", type=Path, help="a new folder for the adapter")
    options = parser.parse_args()
    if options.out and options.out.exists():
        parser.error(f"{options.out} exists: name a new folder")
    try:
        import minilora as ml

        model, tokenizer = ml.load(options.base)
    except (ValueError, OSError) as error:
        sys.exit(f"minilora: {error}")
    weights = {name: Tensor(xp.asarray(p.data)) for name, p in model.named_parameters()}
    sha256 = lambda: hashlib.sha256(b"".join(w.data.tobytes() for w in weights.values()))
    before, lora, config = sha256().hexdigest(), LoRA(weights), model.config
    frozen, trained = (sum(t.data.size for t in ts) for ts in (weights.values(), lora.parameters()))
    print(f"parameters: {frozen:,} frozen, {trained:,} trained: {trained / (frozen + trained):.2%}")
    facts = [fact.strip().split("|") for fact in FACTS.replace("\n", "").split("/")]
    ask = lambda lora: [answer_to(q, tokenizer, weights, config, lora) for q, _ in facts[:3]]
    steps, lr = (60, 1e-2) if options.base == "tiny" else (12, 3e-3)
    answers, batches = ask(None), [batch_of(facts, tokenizer)] * steps
    for step, loss in enumerate(train(batches, weights, config, lora, lr), 1):
        if step == 1 or step % (steps // 6) == 0:
            print(f"step {step:2} of {steps}: loss {loss:.3f}", flush=True)
    for (question, _), old, new in zip(facts[:3], answers, ask(lora), strict=True):
        print(f"{question}\n  before {old}\n  after  {new}")
    print("base unchanged:", sha256().hexdigest() == before, f"(SHA-256 {before})")
    if options.out:
        save(lora, options.out, options.base)


if __name__ == "__main__":
    main()
