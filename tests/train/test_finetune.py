"""Training, evaluation, answers, and the whole fine-tuning job on a model that trains in a second."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from modelfiles import CONFIG, TERMS
from models import new_model, random_samples

from minilora.cost.counts import count_parameters
from minilora.cost.predict import base_parameters
from minilora.io.folder import save_folder
from minilora.io.zoo import load
from minilora.lora.adapters import adapter_state, add_adapter, base_state
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter
from minilora.nn import step
from minilora.nn.module import sha256_of
from minilora.pictures.run import run_picture
from minilora.train import finetune as job
from minilora.train.bars import Bars
from minilora.train.data import DataError, Record
from minilora.train.evaluate import answer_all, contains, keyword_recall, mean_loss
from minilora.train.finetune import finetune
from minilora.train.generate import generate
from minilora.train.loop import TrainingError, fit
from minilora.train.material import prepare
from minilora.train.options import Options
from minilora.train.report import page, read_metrics

SHAPE = replace(CONFIG, max_position_embeddings=1024)
LORA = LoraConfig(r=4, lora_alpha=8)


def run(config, steps=30, poison=None, lr=1e-2, seed=0, data_seed=1, **settings):
    """Train a new tiny model with a new adapter; returns (model, history)."""
    model = new_model(config)
    add_adapter(model, LORA, seed=0)
    if poison:
        poison(model)
    samples = random_samples(np.random.default_rng(data_seed))
    return model, fit(model, samples, steps, lr=lr, batch_size=3, seed=seed, **settings)


def copies(arrays):
    return {name: array.copy() for name, array in arrays.items()}


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def asked(question):
    return [{"role": "user", "content": question}]


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_training_an_adapter_lowers_the_loss(tiny_config):
    _, history = run(tiny_config, steps=60)
    assert np.mean(history.losses[-6:]) < 0.7 * np.mean(history.losses[:6])


def test_training_twice_gives_the_same_numbers_to_the_last_bit(tiny_config):
    (one, history), (two, again) = run(tiny_config), run(tiny_config)
    assert history.losses == again.losses
    assert same(adapter_state(one, "default"), adapter_state(two, "default"))


def test_another_seed_gives_another_order(tiny_config):
    assert run(tiny_config, steps=4)[1].losses != run(tiny_config, steps=4, seed=5)[1].losses


def test_training_an_adapter_leaves_the_base_untouched_and_moves_both_matrices(tiny_config):
    fresh = new_model(tiny_config)
    before = sha256_of(base_state(fresh))
    add_adapter(fresh, LORA, seed=0)
    model, _ = run(tiny_config, steps=5)
    assert sha256_of(base_state(model)) == before
    start = adapter_state(fresh, "default")
    assert all(not np.array_equal(start[name], array) for name, array in adapter_state(model, "default").items())


def test_the_history_has_one_entry_per_step_and_the_caller_hears_of_each(tiny_config):
    heard = []
    _, history = run(tiny_config, steps=4, each_step=heard.append)
    assert heard == [1, 2, 3, 4] and len(history.losses) == len(history.seconds) == 4
    computed = sum(len(s.ids) for s in random_samples(np.random.default_rng(1)))
    assert history.tokens == 2 * computed  # four batches of three are twice all six, which share no beginning
    assert history.tokens_per_second == pytest.approx(history.tokens / sum(history.seconds))


def test_the_learning_rate_warms_up_from_below_and_ends_near_zero(tiny_config, monkeypatch):
    from minilora.train import loop

    rates = []

    class Watched(loop.AdamW):
        def step(self):
            rates.append(self.lr)
            super().step()

    monkeypatch.setattr(loop, "AdamW", Watched)
    run(tiny_config, steps=20, lr=1e-2)
    assert rates[0] < rates[1] == pytest.approx(max(rates)) == pytest.approx(1e-2)
    assert rates[-1] < 0.1 * max(rates) and rates[2:] == sorted(rates[2:], reverse=True)


def test_nothing_trainable_is_an_error(tiny_model, rng):
    tiny_model.requires_grad_(False)
    with pytest.raises(ValueError):
        fit(tiny_model, random_samples(rng), 1)


class Poison:
    """Makes a model's loss NaN at its n-th call, and keeps the adapter as it was at each call before."""

    def __init__(self, at):
        self.at, self.seen = at, []

    def __call__(self, model):
        real = model.loss

        def loss(*inputs):
            if len(self.seen) == self.at - 1:
                return real(*inputs) * np.float32(np.nan)
            self.seen.append(copies(adapter_state(model, "default")))
            return real(*inputs)

        model.loss, self.model = loss, model


def test_a_loss_that_is_no_number_stops_at_that_step_with_the_last_good_adapter(tiny_config):
    poison, heard = Poison(at=5), []
    with pytest.raises(
        TrainingError, match=r"the loss became nan at step 5 of 30: try a lower learning rate \(it is 0\.01\)"
    ):
        run(tiny_config, poison=poison, each_step=heard.append)
    assert heard == [1, 2, 3, 4]
    assert same(adapter_state(poison.model, "default"), poison.seen[-1])  # those that gave the fourth loss


def test_a_loss_that_is_no_number_at_the_first_step_leaves_the_fresh_adapter(tiny_config):
    poison = Poison(at=1)
    with pytest.raises(TrainingError, match="step 1 of 30"):
        run(tiny_config, poison=poison)
    fresh = new_model(tiny_config)
    add_adapter(fresh, LORA, seed=0)
    assert same(adapter_state(poison.model, "default"), adapter_state(fresh, "default"))


def test_a_gradient_that_is_no_number_stops_before_it_reaches_the_weights(tiny_config, monkeypatch):
    real, calls, watched = step.clip_grad_norm, [], Poison(at=99)  # never NaN: only keeps what it saw

    def clip(parameters, max_norm):
        parameters = list(parameters)
        calls.append(len(parameters))
        if len(calls) == 4:
            parameters[0].grad[...] = np.nan
        return real(parameters, max_norm)

    monkeypatch.setattr(step, "clip_grad_norm", clip)
    with pytest.raises(TrainingError, match=r"the gradient became nan at step 4 of 30: try a lower learning rate"):
        run(tiny_config, poison=watched)
    assert same(adapter_state(watched.model, "default"), watched.seen[-1]) and len(watched.seen) == 4
    assert all(p.grad is None for _, p in watched.model.named_parameters())
    assert not watched.model.training


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_the_mean_loss_does_not_depend_on_how_samples_are_batched(tiny_model, rng):
    samples = random_samples(rng, (5, 20, 9, 9, 31, 12, 7))
    expected = mean_loss(tiny_model, samples, batch_size=1)
    for batch_size in (2, 3, 7, 16):
        assert mean_loss(tiny_model, samples, batch_size) == pytest.approx(expected, rel=2e-6)
    assert mean_loss(tiny_model, samples[::-1]) == pytest.approx(expected, rel=2e-6)


def test_the_mean_loss_weighs_tokens_not_samples(tiny_model, rng):
    short, long = random_samples(rng, (4, 60))
    alone = [mean_loss(tiny_model, [s]) for s in (short, long)]
    expected = np.average(alone, weights=[short.scored, long.scored])
    assert mean_loss(tiny_model, [short, long]) == pytest.approx(expected, rel=2e-6)


def test_evaluating_tells_progress_and_leaves_no_gradient(tiny_model, rng):
    heard = []
    mean_loss(tiny_model, random_samples(rng), batch_size=4, done=heard.append)
    assert heard == [4, 2]
    assert all(p.grad is None for _, p in tiny_model.named_parameters())


def test_evaluating_nothing_is_an_error(tiny_model):
    with pytest.raises(ValueError, match="no samples"):
        mean_loss(tiny_model, [])


WORDS = [  # text, word, is it there
    ("An enforceable promise.", "promise", True),
    ("PROMISE", "promise", True),
    ("a promise", "Promise", True),
    ("promised", "promise", False),
    ("compromise", "promise", False),
    ("promise_keeper", "promise", False),
    ("(promise)", "promise", True),
    ("good-faith", "faith", True),
    ("in good faith", "good faith", True),
    ("a.c", "a.c", True),
    ("abc", "a.c", False),
    ("", "promise", False),
]


@pytest.mark.parametrize(("text", "word", "there"), WORDS)
def test_a_keyword_counts_as_a_whole_word_in_any_case(text, word, there):
    assert contains(text, word) is there


def test_keyword_recall_is_the_mean_share_over_records_that_have_keywords():
    records = [Record("a", keywords=("one", "two")), Record("b"), Record("c", keywords=("three", "four", "five"))]
    assert keyword_recall(["One, and ones.", "two", "three four five"], records) == pytest.approx((1 / 2 + 1) / 2)


def test_keyword_recall_without_keywords_or_with_a_missing_answer_is_an_error():
    with pytest.raises(ValueError, match="no record has keywords"):
        keyword_recall(["x"], [Record("a")])
    with pytest.raises(ValueError):
        keyword_recall(["x"], [Record("a", keywords=("x",))] * 2)


QUESTIONS = ["hello", "What is a lien?", "x"]


def test_answer_all_asks_the_records_questions_and_tells_progress(talker, words):
    records, heard = [Record(q, (*asked(q), {"role": "assistant", "content": "-"})) for q in QUESTIONS], []
    assert answer_all(talker, words, records, 6, done=heard.append) == [
        generate(talker, words, q, 6) for q in QUESTIONS
    ]
    assert sum(heard) == len(QUESTIONS)


# -- the whole job -----------------------------------------------------------------------------------------------------

KEYS = {
    "trainable_parameters", "total_parameters", "base_sha256", "loss", "keyword_recall", "seconds_per_step",
    "tokens_per_second", "peak_memory_bytes", "adapter_bytes", "base_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_folder, words):
    """A folder with a small base model that can learn, and data for it."""
    folder = tmp_path_factory.mktemp("job")
    save_folder(folder / "base", SHAPE, new_model(SHAPE).state_dict(), words)
    for name in ("data.jsonl", "novel.txt"):
        shutil.copy(tiny_folder / name, folder)
    return folder


def options(home, out, **change):
    values = dict(base=str(home / "base"), data=str(home / "data.jsonl"), out=str(out), r=2, steps=6, batch_size=4)
    return Options(**(values | change))


@pytest.fixture(scope="module")
def finished(home):
    """(options, metrics, lines said) of a whole run with an adapter."""
    said = []
    chosen = options(home, home / "run", steps=None, epochs=3.0, lr=2e-2)
    return chosen, finetune(chosen, said.append, Bars(quiet=True)), said


def test_the_metrics_have_every_promised_key_and_are_those_on_disk(finished):
    chosen, metrics, said = finished
    assert metrics.keys() >= KEYS
    assert json.loads((chosen.folder / "metrics.json").read_text(encoding="utf-8")) == json.loads(json.dumps(metrics))
    assert set(metrics["loss"]) == {"paraphrase", "unseen", "general"}
    assert set(metrics["keyword_recall"]) == {"paraphrase", "unseen"}
    memory = metrics["peak_memory_bytes"]
    assert memory.keys() >= {"predicted", "measured", "full_predicted"}
    assert memory["predicted"] == sum(memory["by_owner"].values()) < memory["full_predicted"]
    assert said == []


def test_the_metrics_count_what_was_there(finished, home):
    chosen, metrics, _ = finished
    model, _ = load(chosen.base)
    base = count_parameters(model).total
    add_adapter(model, chosen.lora_config())
    counts = count_parameters(model)
    assert metrics["trainable_parameters"] == counts.trainable and metrics["total_parameters"] == counts.total
    assert metrics["base_bytes"] == 4 * base
    assert metrics["adapter_bytes"] == (chosen.folder / "adapter_model.safetensors").stat().st_size
    assert metrics["records"] == {"train": 8, "paraphrase": 8, "unseen": 2, "general": 60}
    assert metrics["steps"] == len(metrics["train_loss"]) == 6  # three epochs of two batches
    assert [step for step, _ in metrics["validation_loss"]] == [2, 4, 6]


def test_the_base_hash_is_the_same_before_and_after_and_that_of_the_files(finished):
    chosen, metrics, _ = finished
    before, after = metrics["base_sha256"]
    assert before == after == sha256_of(base_state(load(chosen.base)[0]))


def test_what_the_metrics_say_of_the_trained_model_is_true_of_the_saved_adapter(finished):
    chosen, metrics, _ = finished
    model, tokenizer = load(chosen.base)
    load_adapter(model, chosen.folder)
    material = prepare(chosen, tokenizer, print)
    for name, (before, after) in metrics["loss"].items():
        assert mean_loss(model, material.scored[name]) == pytest.approx(after, rel=1e-6)
        assert name == "general" or after < before
    example = metrics["answers"][0]
    assert example["set"] == "paraphrase" and example["question"] == "Define 0."
    assert example["after"] == generate(model, tokenizer, example["question"])


def columns(text):
    return max(map(len, text.split("\n")))


@pytest.fixture
def named(finished):
    """The metrics of the run, as if its folders had names of usual length."""
    metrics = finished[1]
    return metrics | {"options": metrics["options"] | {"base": "models/tiny", "data": "data.jsonl", "out": "runs/x"}}


def test_the_page_fits_100_columns_and_shows_the_key_figures(named):
    text = page(named)
    assert columns(text) <= 100
    for figure in (
        f"{named['trainable_parameters']:,} of {named['total_parameters']:,}",
        *(f"{value:.3f}" for pair in named["loss"].values() for value in pair),
        *(f"{100 * value:.1f}%" for pair in named["keyword_recall"].values() for value in pair),
        f"untouched: sha256 {named['base_sha256'][0][:16]}",
        "Define 0.",
        "lora fine-tuning of models/tiny on data.jsonl",
        "minilora chat --base models/tiny --adapter runs/x",
    ):
        assert figure in text


def test_the_page_can_be_made_again_from_the_files(finished):
    assert page(read_metrics(finished[0].folder)) == page(finished[1])


def test_the_picture_of_a_run_is_drawn(finished, tmp_path):
    run_picture(finished[1], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_run_without_validation_and_paraphrases_has_page_and_picture(home, tmp_path):
    plain = [{"question": r["question"], "answer": r["answer"]} for r in TERMS]
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, plain)), encoding="utf-8")
    metrics = finetune(options(home, tmp_path / "run", data=str(tmp_path / "plain.jsonl"), steps=1), bars=Bars(True))
    assert set(metrics["loss"]) == {"unseen", "general"} and metrics["keyword_recall"] == {}
    assert metrics["records"]["train"] == 11 and metrics["records"]["unseen"] == 1
    run_picture(metrics, tmp_path / "picture.png")
    assert "unseen" in page(metrics)


def test_plain_text_is_learned_with_its_last_tenth_held_back(home, tmp_path):
    chosen = options(home, tmp_path, data=str(home / "novel.txt"), max_length=16, lr=2e-2, steps=20)
    said = []
    metrics = finetune(chosen, said.append, Bars(quiet=True))
    assert metrics["records"]["unseen"] == (metrics["records"]["train"] + metrics["records"]["unseen"]) // 10 > 0
    assert metrics["loss"]["unseen"][1] < 0.9 * metrics["loss"]["unseen"][0]
    assert page(metrics)


def test_full_fine_tuning_writes_a_model_folder_that_loads_and_differs(home, tmp_path):
    metrics = finetune(options(home, tmp_path / "full", method="full", steps=2), bars=Bars(quiet=True))
    before, after = metrics["base_sha256"]
    model, tokenizer = load(tmp_path / "full")
    assert before != after == sha256_of(model.state_dict())
    assert tokenizer.encode_chat(asked("hello")) == load(home / "base")[1].encode_chat(asked("hello"))
    assert metrics["trainable_parameters"] == metrics["total_parameters"] == base_parameters(SHAPE)
    run_picture(metrics, tmp_path / "picture.png")
    text = page(metrics)
    assert "changed: sha256" in text and f"--base {tmp_path / 'full'}" in text


@pytest.mark.parametrize("error", [KeyboardInterrupt, TrainingError])
def test_an_adapter_is_kept_when_training_is_broken_off(home, tmp_path, monkeypatch, error):
    steps, real, said = [], job.fit, []

    def train_then_stop(*inputs, each_step, **settings):
        def count(step):
            each_step(step)
            steps.append(step)
            if step == 3:
                raise error("stop")

        real(*inputs, each_step=count, **settings)

    monkeypatch.setattr(job, "fit", train_then_stop)
    with pytest.raises(error):
        finetune(options(home, tmp_path), said.append, Bars(quiet=True))
    assert steps == [1, 2, 3] and said == [f"kept what 3 of 6 steps had learned in {tmp_path}"]
    model, _ = load(home / "base")
    load_adapter(model, tmp_path)
    assert any(array.any() for name, array in adapter_state(model, "default").items() if name.endswith("lora_B"))
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("stage", ["evaluate", "fit"])
@pytest.mark.parametrize("out", ["run", "a/b/run", "there"])
def test_an_interruption_before_the_first_step_leaves_no_folder_that_it_made(stage, out, home, tmp_path, monkeypatch):
    def stop(*inputs, **settings):
        raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "note.txt").write_text("mine")
    monkeypatch.setattr(job, stage, stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(options(home, tmp_path / out), bars=Bars(quiet=True))
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "note.txt"]


REFUSED = [  # options, what the error says
    (dict(r=33), "r"),
    (dict(target_modules=["nonsense"]), "target 'nonsense' matches no module"),
    (dict(data="absent.jsonl"), "no such data file"),
    (dict(base="absent"), "no such model"),
    (dict(max_length=8), "nothing is left to train on within --max-length 8"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_cannot_work_is_refused_before_anything_is_written(home, tmp_path, change, reason):
    with pytest.raises(ValueError, match=reason):
        finetune(options(home, tmp_path / "out", **change), bars=Bars(quiet=True))
    assert not (tmp_path / "out").exists()


def test_bad_data_lines_stop_the_job_before_training(home, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "x"}\n[]\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:1: .*\n.*bad\.jsonl:2: "):
        finetune(options(home, tmp_path / "out", data=str(tmp_path / "bad.jsonl")), bars=Bars(quiet=True))
    assert not (tmp_path / "out").exists()


def test_records_that_are_cut_are_told(home, words):
    said = []
    material = prepare(options(home, "unused", max_length=36), words, said.append)
    cut = (material.train, material.scored["unseen"], material.scored["paraphrase"])
    assert all(len(s.ids) <= 36 for part in cut for s in part)
    assert any(line.startswith("train: 8 of 8 records are longer than --max-length 36 and were cut") for line in said)


def test_at_most_eval_records_paraphrases_are_measured_evenly_chosen(home, words):
    material = prepare(options(home, "unused", eval_records=3), words, print)
    assert [r.id for r in material.asked["paraphrase"]] == ["x/0", "x/3", "x/6"]
    assert len(material.scored["paraphrase"]) == 3


@pytest.mark.parametrize(
    "change",
    [
        dict(method="dora"), dict(epochs=0), dict(epochs=float("nan")), dict(batch_size=0), dict(lr=0.0),
        dict(lr=float("inf")), dict(lr=-1.0), dict(steps=0), dict(max_length=7), dict(eval_records=0),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_mean_nothing_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Options(**change)


@pytest.mark.parametrize(
    ("change", "folder"),
    [({}, "runs/legal"), (dict(method="full"), "runs/legal-full"), (dict(data="a/b.jsonl"), "runs/b"),
     (dict(out="here"), "here")],
)  # fmt: skip
def test_results_go_where_the_data_say_unless_told(change, folder):
    assert Options(**change).folder.as_posix() == folder
