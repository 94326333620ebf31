"""A script as a user with a type checker writes it: mypy checks it with the package, and test_types.py runs it."""

from typing import Any, assert_type

import numpy as np

import minilora as ml


class Net(ml.Module):
    def __init__(self) -> None:
        self.layers = [ml.Linear(4, 4, rng=0), ml.Linear(4, 1, bias=True, rng=1)]
        self.scale = ml.Parameter(np.ones(1, np.float32))

    def forward(self, x: ml.Tensor) -> ml.Tensor:
        return self.layers[1](self.layers[0](x).relu()) @ self.scale.T


@ml.op
def cube(x: Any) -> tuple[Any, ...]:
    return x**3, lambda g: g * 3 * x**2


net: Net = Net().train().requires_grad_(True).eval()
y = net(ml.Tensor(np.ones((2, 4), np.float32)))
assert_type(cube(y).mean(axis=0, keepdims=True).sum().item(), float)
assert_type(2 * y.T - y.exp() / (1 + y.sigmoid()), ml.Tensor)
assert_type(sorted({y: 1, cube(y): 2}.values()), list[int])
print(int((y > 0).sum()), (y == 0.5).any(), cube.forward(np.ones(3))[0])

parameter = ml.Parameter([1.0, 2.0])
with ml.no_grad():
    parameter -= 0.1
    parameter *= 2
assert_type(parameter, ml.Parameter)

model, tokenizer = ml.load("tiny")
assert isinstance(model, ml.Llama)
assert_type(model.config.hidden_size, int)
hook = model.model.layers[0].register_forward_hook(lambda module, inputs, x: None)
with hook, ml.no_grad():
    x = model.model.norm(model.model.embed_tokens(np.array([[1, 2]])))
assert_type(x, ml.Tensor)
names = ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4, target_modules={"q_proj", "v_proj"}))
assert_type(names, list[str])
