"""What the public names alone are enough for: an experiment in twenty lines."""

import inspect

import pytest

import minilora as ml


def ranks_and_seeds():
    splits = ml.split_records(ml.read_records("legal"))
    results = {}
    for r in (1, 16):
        for seed in (0, 1):
            model, tokenizer = ml.load("tiny")
            train = ml.encode_records(splits["train"][:16], tokenizer)
            unseen = ml.encode_records(splits["test"][:4], tokenizer)
            ml.add_adapter(model, ml.LoraConfig(r=r, lora_alpha=2 * r), seed=seed)
            before = ml.mean_loss(model, unseen)
            ml.fit(model, train, steps=4, lr=1e-2, batch_size=4, seed=seed)
            results[r, seed] = before, ml.mean_loss(model, unseen)
    return results


@pytest.mark.long
def test_ranks_are_compared_over_seeds_in_twenty_lines_of_public_names():
    assert len(inspect.getsource(ranks_and_seeds).splitlines()) <= 20
    results = ranks_and_seeds()
    assert len({before for before, _ in results.values()}) == 1  # a fresh adapter is no change
    assert all(after < before for before, after in results.values())
    assert len({after for _, after in results.values()}) == 4
