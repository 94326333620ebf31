"""Parity of the folded blocks in the lessons, "The same in PyTorch": each runs, and gives what minilora gives."""

import ast
import inspect
import re
import symtable

import numpy as np
import pytest
from lessonfiles import GLOSSARY, LESSONS
from modelfiles import codes_of
from otherside import distance, logits_of, own_logits, parity, peft, ranks_and_scales, torch, transformers
from smallmodels import shaken

import minilora as ml
from minilora.engine.attention import attention
from minilora.engine.fused import cross_entropy, lora_linear
from minilora.engine.recompute import recomputed
from minilora.files.levels import LEVELS
from minilora.files.quant import Packed, quantize
from minilora.lora.adapters import lora_modules
from minilora.measure.ledger import kept_arrays
from minilora.models.folder import save_folder
from minilora.nn.gpt2 import GPT2, GPT2Config
from minilora.nn.optim import clip_grad_norm

pytestmark = [*parity, pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")]

BLOCK = re.compile(
    r"^# <details><summary>The same in PyTorch</summary>\n#\n# ```python\n(.*?)^# ```\n#\n# </details>\n#\n"
    r"(?=# ## What to remember\n)",
    re.DOTALL | re.MULTILINE,
)
LESSON = {path.stem: path.read_text("utf-8") for path in sorted((LESSONS / "src").glob("[0-9]*.py"))}
BLOCKS = {name: re.sub(r"(?m)^# ?", "", found[1]) for name, text in LESSON.items() if (found := BLOCK.search(text))}
each_block = pytest.mark.parametrize("name", BLOCKS)


def same(got, wanted, atol=1e-6):
    """Arrays of the same shape and of the same values, up to atol times the largest, or to atol if that is larger."""
    got, wanted = (a.detach().numpy() if isinstance(a, torch.Tensor) else np.asarray(a) for a in (got, wanted))
    assert got.shape == wanted.shape
    assert distance(got, wanted) <= atol * max(1, np.abs(wanted).max())


def differs(got, wanted):
    """The comparison says something: these are not the same."""
    assert distance(got.detach().numpy(), wanted) > 1e-3


def trained(array):
    return ml.Tensor(array.copy(), requires_grad=True)


@pytest.fixture(autouse=True)
def own_operations(monkeypatch):
    monkeypatch.setattr("minilora.engine.tensor.OPS", {})  # or other tests would ask for an example of these


# -- what each block is compared with: lessonNN(run, rng) runs it on inputs under the lesson's own names ---------------


def lesson01(run, rng):
    x, W, c = (rng.standard_normal(shape) for shape in [(8, 5), (3, 5), (8, 3)])
    theirs = run(x=x, W=W, c=c)

    @ml.op
    def layer(x, W):
        y = np.tanh(x @ W.T)
        return y, lambda g: (g * (1 - y**2)) @ W, lambda g: (g * (1 - y**2)).T @ x

    assert theirs["passed"] and ml.gradcheck(layer, x, W)
    inputs = trained(x), trained(W)
    layer(*inputs).backward(c)
    for name, tensor in zip(("dx", "dW"), inputs, strict=True):
        same(theirs[name], tensor.grad, 1e-12)


def lesson02(run, rng):
    layers, inputs = rng.standard_normal((3, 5, 5)), rng.standard_normal((6, 5))
    theirs = run(layers=layers, inputs=inputs)
    weights = [ml.Tensor(layers[0]), trained(layers[1]), trained(layers[2])]
    x = ml.Tensor(inputs)
    for weight in weights:
        x = (x @ weight).tanh()
    x.sum().backward()
    assert theirs["grads"][0] is weights[0].grad is None
    for got, weight in zip(theirs["grads"][1:], weights[1:], strict=True):
        same(got, weight.grad, 1e-12)
    with ml.no_grad():
        assert theirs["recorded"] is (weights[1] @ weights[2]).requires_grad is False


def lesson03(run, rng):
    ids = rng.integers(27, size=300)
    theirs = run(ids=ids)
    W = trained(np.zeros((27, 27)))
    optimizer = ml.AdamW([W], lr=0.2, weight_decay=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        cross_entropy(ml.Tensor(np.eye(27)[ids[:-1]]) @ W, ids[1:]).backward()
        optimizer.step()
    for name, array in {"W": W.data, "m": optimizer.m[0], "v": optimizer.v[0]}.items():
        same(theirs[name], array, 1e-9)


def lesson04(run, rng):
    q, k, v = rng.standard_normal((3, 10, 8))
    theirs = run(q=q, k=k, v=v)
    same(theirs["y"], attention(*(ml.Tensor(x[None, :, None]) for x in (q, k, v))).data[0, :, 0], 1e-12)
    grouped = q.reshape(1, 10, 4, 2), *(x[:, :4].reshape(1, 10, 2, 2) for x in (k, v))  # (B, T, H, D), (B, T, K, D)
    same(theirs["grouped"].transpose(1, 2), attention(*map(ml.Tensor, grouped)).data, 1e-12)


def lesson05(run, rng):
    model, _ = ml.load("tiny")
    ids = rng.integers(2048, size=40)
    theirs = run(weights=ml.base_state(model), ids=ids)
    same(theirs["logits"], own_logits(model, ids[None])[0], 1e-5)
    assert theirs["number"] == ml.count_parameters(model).total


def lesson06(run, rng):
    _, tokenizer = ml.load("tiny")
    facts = ml.read_records("legal")[:5]
    theirs = run(facts=facts)["batch"]
    samples = ml.encode_records(facts, tokenizer)
    for name, rows in zip(("input_ids", "labels"), ml.collate(samples, tokenizer.pad_id), strict=True):
        same(theirs[name], rows, 0)
    assert theirs["attention_mask"].sum(1).tolist() == [len(sample.ids) for sample in samples]


def lesson07(run, rng):
    model, tokenizer = ml.load("tiny")
    law = {"train": ml.encode_records(ml.read_records("legal")[:12], tokenizer)}
    theirs = run(ml=ml, law=law)
    model.requires_grad_(True)
    optimizer = ml.AdamW(model.trainable_parameters(), lr=1e-3, weight_decay=0)
    loss = model.loss(*ml.collate(law["train"][:8]))
    loss.backward()
    optimizer.step()
    same(theirs["loss"], loss.data, 1e-5)
    ours = dict(model.named_parameters())
    for name, p in theirs["theirs"].named_parameters():
        rows = np.arange(len(p)) != (tokenizer.pad_id if "embed_tokens" in name else -1)  # torch skips its padding_idx
        grad = ours[name].grad[rows]
        same(p.grad[rows], grad, 1e-5)
        large = np.abs(grad) > 1e-2 * np.abs(grad).max()  # Adam's first step is the sign of the gradient
        same(p[rows][large], ours[name].data[rows][large], 1e-5)


def lesson08(run, rng):
    delta = rng.standard_normal((14, 3)) @ rng.standard_normal((3, 12)) + 0.01 * rng.standard_normal((14, 12))
    theirs = run(updates={"model.layers.0.self_attn.q_proj.weight": delta})
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    same(theirs["first"], s[0] * np.outer(u[:, 0], vt[0]), 1e-9)
    same(theirs["total"], (delta**2).sum(), 1e-9)
    same(theirs["share"], (s[:8] ** 2).sum() / (s**2).sum(), 1e-9)
    assert theirs["rank"] == np.linalg.matrix_rank(delta) == 12


def lesson09(run, rng):
    x, W, A, B, g = (rng.standard_normal(shape) for shape in [(3, 4), (5, 4), (2, 4), (5, 2), (3, 5)])
    layer = run()["LoraLinear"](torch.nn.Linear(4, 5, bias=False), r=2, alpha=3).double()
    x = torch.tensor(x)
    same(layer(x), layer.base(x), 0)  # B is zero
    assert layer.A.weight.any() and layer.A.weight.abs().max() <= 1 / 4**0.5
    for part, array in {layer.base: W, layer.A: A, layer.B: B}.items():
        part.weight.data = torch.tensor(array)
    a, b = trained(A), trained(B)
    ours = lora_linear(x.numpy(), W, a, b, scale=3 / 2)
    ours.backward(g)
    y = layer(x)
    y.backward(torch.tensor(g))
    for got, wanted in {y: ours.data, layer.A.weight.grad: a.grad, layer.B.weight.grad: b.grad}.items():
        same(got, wanted, 1e-12)
    assert layer.base.weight.grad is None


def lesson10(run, rng):
    input_ids = rng.integers(2048, size=(4, 24))
    theirs = run(input_ids=input_ids)
    model, _ = ml.load("tiny")
    off = own_logits(model, input_ids)
    torch.manual_seed(0)  # as before the block: the same A and B
    peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained("tiny"), theirs["config"]).save_pretrained(
        "a"
    )
    ml.load_adapter(model, "a")
    on = own_logits(model, input_ids)
    differs(theirs["on"], off)
    same(theirs["on"], on, 1e-5)
    same(theirs["off"], off, 1e-5)
    same(theirs["merged"], on, 1e-5)


def lesson12(run, rng):
    theirs = run()
    model, _ = ml.load("tiny")
    patterns = {"rank_pattern": {"down_proj": 16}, "alpha_pattern": {"down_proj": 32}}
    ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_rslora=True, **patterns))
    layers = {path: module.adapters["default"] for path, module in lora_modules(model).items()}
    scales = {f"base_model.model.{path}": (layer.rank, layer.scale) for path, layer in layers.items()}
    assert theirs["scales"] == scales and len(set(scales.values())) == 2


def lesson13(run, rng):
    theirs = run()
    model = ml.Llama.empty(ml.Config(49152, 576, 1536, 30, num_attention_heads=9, num_key_value_heads=3))
    ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    counts = ml.count_parameters(model)
    assert (theirs["trainable"], theirs["total"]) == (counts.trainable, counts.total)


def lesson14(run, rng):
    T = 50
    x, W, A, B = (rng.standard_normal(shape) for shape in [(T, 32), (24, 32), (4, 32), (24, 4)])
    theirs = run(x=x, W=W, A=A, B=B, T=T)
    assert [name for name in "xWAB" if theirs[name].requires_grad] == ["x", "A", "B"]
    layer = lambda x: lora_linear(x, ml.Tensor(W), trained(A), trained(B), scale=2.0)
    for got, y in zip(theirs["numbers"], (layer(trained(x)), recomputed(layer, trained(x))), strict=True):
        saved = {id(array): array.size for _, array in kept_arrays(y.node) if len(array) == T}
        assert got == sum(saved.values()) // T > 0


def lesson15(run, rng):
    W, x = rng.standard_normal((24, 128), np.float32), rng.standard_normal((5, 128))
    A, B = rng.standard_normal((2, 128)), rng.standard_normal((24, 2))
    theirs = run(W=W, x=x, A=A, B=B, LEVELS=LEVELS)
    raw = quantize(W, "NF4")
    assert np.array_equal(theirs["codes"].view(W.shape), codes_of(raw, "NF4"))
    inputs = trained(x), trained(A), trained(B)
    y = lora_linear(inputs[0], ml.Parameter(Packed(raw, "NF4"), requires_grad=False), *inputs[1:], scale=2.0)
    y.sum().backward()
    same(theirs["y"], y.data, 1e-12)
    for name, tensor in zip("xAB", inputs, strict=True):
        same(theirs[name].grad, tensor.grad, 1e-12)


def lesson16(run, rng):
    ids = rng.integers(2048, size=(4, 24))
    theirs = run(ids=ids)
    model, _ = ml.load("tiny")
    for name in ("legal", "support"):
        ml.load_adapter(model, name, name=name)
    with ml.mixed_batch(model, ["legal", "support", None]):
        mixed = own_logits(model, ids[:3])
    differs(theirs["mixed"][:2], own_logits(model, ids[:2]))  # the active adapter is the last one
    same(theirs["mixed"], mixed, 1e-5)
    ml.set_adapter(model, {"legal": 0.5, "support": 0.5})
    same(logits_of(theirs["model"], ids), own_logits(model, ids), 1e-5)


def lesson18(run, rng):
    model, tokenizer = ml.load("tiny")
    samples = {"train": ml.encode_records(ml.read_records("legal")[:4], tokenizer)}  # a batch is all of them
    run(folder="legal", samples=samples)
    ml.load_adapter(model, "legal", name="ours")
    before = {name: array.copy() for name, array in ml.adapter_state(model, "ours").items()}
    optimizer = ml.AdamW(model.trainable_parameters(), weight_decay=0)
    for step in range(12):  # the schedule, the clipping and the optimizer are the defaults of TrainingArguments
        optimizer.lr = 2e-3 * (1 - step / 12)
        optimizer.zero_grad()
        model.loss(*ml.collate(samples["train"])).backward()
        clip_grad_norm(optimizer.parameters, 1.0)
        optimizer.step()
    ml.load_adapter(model, "continued", name="theirs")
    theirs = ml.adapter_state(model, "theirs")
    for name, array in ml.adapter_state(model, "ours").items():
        assert np.linalg.norm(theirs[name] - array) < 1e-3 * np.linalg.norm(array - before[name])


def lesson19(run, rng):
    variants = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}
    variants["PiSSA"] = {"init_lora_weights": "pissa"}
    theirs = run(variants=variants)
    ids = rng.integers(2048, size=(2, 24))
    for name, options in variants.items():
        model, _ = ml.load("tiny")
        base = own_logits(model, ids)
        ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **options))
        got = theirs["models"][name]
        assert got.get_nb_trainable_parameters()[0] == ml.count_parameters(model).trainable
        scales = {path: module.adapters["default"] for path, module in lora_modules(model).items()}
        assert ranks_and_scales(got) == {path: (weights.rank, weights.scale) for path, weights in scales.items()}
        same(logits_of(got, ids), base, 1e-4)  # all start as the base
        if name == "PiSSA":
            for path, weights in scales.items():
                own = got.get_submodule(f"base_model.model.{path}")
                factors = own.lora_B["default"].weight @ own.lora_A["default"].weight
                same(factors, weights.lora_B.data @ weights.lora_A.data, 1e-4)
        if name == "LoRA":
            rates = ml.lora_plus(model.trainable_parameters(), ratio=16)
            wanted = {name.replace(".adapters.default.", "."): 1e-3 * rate for name, rate in rates.items()}
    rate = {id(p): group["lr"] for group in theirs["optimizer"].param_groups for p in group["params"]}
    named = theirs["models"]["LoRA"].named_parameters()
    got = {name.removeprefix("base_model.model.").replace(".default.weight", ""): rate[id(p)]
           for name, p in named if p.requires_grad}  # fmt: skip
    assert got == pytest.approx(wanted)


def lesson20(run, rng):
    model = GPT2(GPT2Config(16, 32, 2, 2, max_position_embeddings=96))
    theirs = run(V=16, TESTED=96, C=32, L=2, H=2)["theirs"]
    assert theirs.num_parameters() == ml.count_parameters(model).total
    for name, p in theirs.named_parameters():
        w = p.detach().numpy()
        dict(model.named_parameters())[name].data = w.T if "c_" in name and w.ndim == 2 else w
    ids = rng.integers(16, size=(2, 24))
    same(own_logits(model, ids), logits_of(theirs.eval(), ids), 1e-4)


def lesson21(run, rng):
    model, tokenizer = ml.load("tiny")
    ml.add_adapter(model, ml.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), name="a", seed=1)
    (pair,) = ml.with_reference(model, ml.encode_pairs(ml.read_records("legal-pairs")[:1], tokenizer, beta=0.3))
    for parameter in model.trainable_parameters().values():  # an adapter that is no longer the base
        parameter.data += rng.normal(0, 0.02, parameter.shape).astype(np.float32)
    ml.save_adapter(model, "preferred", name="a")
    theirs = run(pair=pair)
    loss = ml.mean_loss(model, [pair])
    assert abs(loss - np.log(2)) > 1e-2  # it has moved
    assert theirs["loss"].item() == pytest.approx(loss, rel=1e-4)
    assert theirs["reference"].item() == pytest.approx(pair.reference, rel=1e-4)


COMPARED = {name: globals().get(f"lesson{name[:2]}") for name in BLOCKS}


# -- the blocks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder that holds what blocks read: the tiny base, also under the real model's name, and two adapters of it."""
    home = tmp_path_factory.mktemp("lessons")
    model, tokenizer = ml.load("tiny")
    for name in ("tiny", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        save_folder(home / name, model.config, ml.base_state(model), tokenizer)
    for seed, name in enumerate(("legal", "support")):
        ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name=name, seed=seed)
        ml.save_adapter(shaken(model, name, seed), home / name, name=name)
    return home


@each_block
def test_a_block_gives_what_minilora_gives(name, home, rng, monkeypatch):
    assert COMPARED[name], f"{name} has a block: compare it in a function lesson{name[:2]} of this file"
    monkeypatch.chdir(home)
    names = symtable.symtable(LESSON[name], name, "exec").get_symbols()
    defined = {symbol.get_name() for symbol in names if symbol.is_assigned() or symbol.is_imported()}

    def run(**inputs):
        """The names that the block has defined when it has run after the lesson, whose names `inputs` are."""
        assert inputs.keys() <= defined
        scope = dict(inputs)
        exec(compile(BLOCKS[name], f"the block of {name}", "exec"), scope)
        return scope

    torch.manual_seed(0)
    COMPARED[name](run, rng)


@each_block
def test_a_block_is_short_and_needs_torch_transformers_and_peft_alone(name):
    lines = BLOCKS[name].splitlines()
    code = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert 6 <= len(code) <= 10 and max(map(len, lines)) <= 100
    imports = [node for node in ast.walk(ast.parse(BLOCKS[name])) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert {module.partition(".")[0] for module in modules} <= {"torch", "transformers", "peft"}


@pytest.mark.parametrize("name", LESSON)
def test_every_folded_part_of_a_lesson_is_such_a_block(name):
    assert LESSON[name].count("<details>") == LESSON[name].count("The same in PyTorch") == (name in BLOCKS)


# -- the glossary ------------------------------------------------------------------------------------------------------

pytest.importorskip("peft.optimizers")
ROOTS = {
    "peft": peft,
    "torch": torch,
    "nn": torch.nn,
    "F": torch.nn.functional,
    "Tensor": torch.Tensor,
    "transformers": transformers,
}
NAMES = sorted({name for row in GLOSSARY for cell in row[3:] for name in re.findall("`([^`]+)`", cell)})


def exists(name):
    """Raises an error if `module.name` or `name(argument=...)` does not exist in these libraries."""
    node = ast.parse(name, mode="eval").body
    if not isinstance(node, ast.Call):
        eval(name, vars(peft) | ROOTS)
        return
    found = eval(ast.unparse(node.func), vars(peft) | ROOTS)
    try:
        arguments = set(inspect.signature(found).parameters)
    except ValueError:  # written in C++: its documentation starts with its arguments
        arguments = set(re.findall(r"(\w+)=", found.__doc__.partition("->")[0]))
    assert {keyword.arg for keyword in node.keywords} <= arguments, f"{name} has the arguments {sorted(arguments)}"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_glossary_exists(name):
    exists(name)


@pytest.mark.parametrize("name", ["F.attention", "LoraConfig(rank=8)", "F.scaled_dot_product_attention(causal=True)"])
def test_a_name_that_does_not_exist_is_found(name):
    with pytest.raises((AttributeError, AssertionError)):
        exists(name)
