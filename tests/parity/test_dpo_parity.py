"""Parity with TRL: DPO's loss and gradients on pairs, with the base, or a trained adapter, as the reference."""

import numpy as np
import pytest
from otherside import VOCAB, assert_same_gradients, parity, peft, small_pair, torch, trained_by, transformers

from minilora.lora.adapters import add_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.peft import save_adapter
from minilora.measure.preferences import preferences, with_reference
from minilora.nn.optim import SGD
from minilora.nn.parts import Pair, Sample
from minilora.nn.step import training_step

trl = pytest.importorskip("trl", reason="needs trl: pip install 'minilora[parity]'")
tokenizers = pytest.importorskip("tokenizers")
datasets = pytest.importorskip("datasets")

pytestmark = parity


def rows(rng):
    lengths = [(4, 9, 3), (7, 2, 5), (3, 6, 6)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [dict(zip(names, (rng.integers(5, VOCAB, n).tolist() for n in each), strict=True)) for each in lengths]


def pairs_of(rows, beta):
    def sample(prompt, answer):
        return Sample((*prompt, *answer), (*[-100] * len(prompt), *answer))

    return [
        Pair(sample(r["prompt_ids"], r["chosen_ids"]), sample(r["prompt_ids"], r["rejected_ids"]), beta=beta)
        for r in rows
    ]


def trainer_of(theirs, beta, folder):
    """TRL's trainer around a PEFT model. Its own data are not used: it only must have some."""
    vocabulary = {f"w{i}": i for i in range(VOCAB)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w2", eos_token="w2")
    some = datasets.Dataset.from_list([{"prompt": "w5 w6", "chosen": " w7", "rejected": " w8"}])
    arguments = trl.DPOConfig(
        str(folder), beta=beta, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False
    )
    return trl.DPOTrainer(theirs, args=arguments, train_dataset=some, processing_class=tokenizer)


@pytest.mark.parametrize("trained", [False, True], ids=["a new adapter", "a trained adapter"])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_loss_gradients_and_rewards_are_trls(tmp_path, rng, beta, trained):
    theirs, ours = small_pair(tmp_path, tied=False)
    add_adapter(ours, LoraConfig(r=4, lora_alpha=8, init_lora_weights=not trained), seed=3)
    theirs = peft.PeftModel.from_pretrained(theirs, save_adapter(ours, tmp_path / "a"), is_trainable=True).eval()
    trainer, chosen = trainer_of(theirs, beta, tmp_path / "trl"), rows(rng)
    pairs = with_reference(ours, pairs_of(chosen, beta))
    for name, p in trained_by(theirs).items():  # both have moved since the reference, by the same
        moved = np.random.default_rng(len(name)).normal(0, 0.1, p.shape).astype(np.float32)
        ours.trainable_parameters()[name.replace(".lora_", ".adapters.default.lora_")].data += moved
        p.data += torch.from_numpy(moved)
    loss = trainer.compute_loss(theirs, trainer.data_collator(chosen))
    loss.backward()
    got, _ = training_step(ours, SGD(ours.trainable_parameters(), lr=0.0), pairs)
    assert got == pytest.approx(loss.item(), rel=1e-5) and abs(got - np.log(2)) > 1e-3
    mine = {name.replace(".adapters.default.", "."): p for name, p in ours.trainable_parameters().items()}
    assert_same_gradients(mine, trained_by(theirs))
    theirs_said = {name: float(np.mean(values)) for name, values in trainer._metrics["eval"].items()}
    found = preferences(ours, pairs)
    assert found["margin"] == pytest.approx(theirs_said["rewards/margins"], rel=1e-3, abs=1e-5)
    assert found["accuracy"] == pytest.approx(theirs_said["rewards/accuracies"])
