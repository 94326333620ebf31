"""The model card of a run: the hub can read its head, its figures are the run's, its commands do what they say."""

import copy
import hashlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from modelfiles import TERMS

import minilora as ml
from minilora.cli import main
from minilora.files.tensors import write_tensors
from minilora.lora.peft import PREFIX, WEIGHTS_FILE
from minilora.pages.card import HELD_OUT, USES, write_card
from minilora.train.material import TESTS
from minilora.train.options import Options

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
METRICS = {
    "options": {"method": "lora", "base": "smollm2", "data": "legal", "out": "runs/legal", "r": 8, "lora_alpha": 16.0,
                "target_modules": "all-linear", "lr": 2e-3, "batch_size": 8, "max_length": 512, "seed": 0,
                "quantized": True, "recompute": False, "device": "cpu", "steps": None},
    "created": "2026-11-25T10:00:00+00:00",
    "steps": 120,
    "records": {"train": 240, "validation": 0, "paraphrase": 80, "unseen": 30, "general": 60},
    "trainable_parameters": 2_442_240,
    "total_parameters": 136_957_248,
    "audit": {},
    "base_sha256": ["0123456789abcdef" * 4] * 2,
    "loss": {"paraphrase": [3.0, 1.5], "unseen": [2.5, 2.6], "general": [2.0, 2.1]},
    "keyword_recall": {"paraphrase": [0.125, 0.5], "unseen": [0.0, 0.0625]},
    "answers": [{"set": "unseen", "question": "Define\ntort.", "before": "", "after": "A wrong " * 20}],
    "seconds_per_step": 1.234,
    "training_seconds": 90.0,
    "peak_memory_bytes": {"predicted": 1_000_000_000, "measured": 99_500_000},
    "adapter_bytes": 10_000_000,
    "base_bytes": 540_000_000,
}  # fmt: skip


def card_of(folder, options=(), holds=("lora_A.weight", "lora_B.weight"), **changes):
    """holds: what the adapter's file has of a module."""
    metrics = copy.deepcopy(METRICS) | changes
    metrics["options"] |= dict(options)
    if metrics["options"]["method"] == "lora":
        write_tensors(folder / WEIGHTS_FILE, {f"{PREFIX}model.x.{name}": np.ones(1, np.float32) for name in holds})
    return write_card(folder, metrics, vars(Options())).read_text(encoding="utf-8")


def blocks(text, kind):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def head_of(path):
    """The front matter as the hub's own library reads it."""
    hub = pytest.importorskip("huggingface_hub", exc_type=ImportError)
    return hub.ModelCard.load(path).data.to_dict()


@pytest.mark.long
def test_the_hub_reads_the_head_and_finds_the_base(tmp_path):
    card_of(tmp_path)
    assert head_of(tmp_path / "README.md") == {
        "base_model": HUB,
        "license": "apache-2.0",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["minilora", "lora", f"base_model:adapter:{HUB}"],
    }


def test_of_data_and_bases_of_ones_own_the_head_claims_nothing(tmp_path):
    card_of(tmp_path, {"data": "own/my data.jsonl"})
    assert "license" not in head_of(tmp_path / "README.md")
    card_of(tmp_path, {"base": "models/llama-3.2-1b", "method": "full"})
    head = head_of(tmp_path / "README.md")
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["minilora"]}


def test_the_figures_are_the_runs(tmp_path):
    text = card_of(tmp_path)
    for line in (
        "# legal: a LoRA adapter for SmolLM2-135M-Instruct",
        "| loss, training questions, paraphrased | 3.000 | 1.500 | -50 % |",
        "| loss, questions not in the training data | 2.500 | 2.600 | +4 % |",
        "| loss, general text | 2.000 | 2.100 | +5 % |",
        "| keyword recall, training questions, paraphrased | 12.5 % | 50.0 % | +37.5 points |",
        "| 240 | training |",
        "| `r` | `8` |",
        "| `quantized` | `true` |",
        "| training | 1.5 minutes, 1.23 s per step |",
        "| memory of a step, predicted | 1,000 MB |",
        "| memory of the process at its peak | 99.5 MB |",
        "| adapter on disk | 10.0 MB; the base takes 540 MB in memory |",
        "- For questions that were not in the training data, its answers lack 94 % of the keywords.",
        "    Define tort.",
        "      before (nothing)",
    ):
        assert line in text.splitlines(), line
    assert "2,442,240 of 136,957,248 parameters (1.783 %)" in " ".join(text.split())
    assert "validation" not in text  # the run had none
    assert METRICS["base_sha256"][0] in text and "recompute" not in text and "run.toml" not in text
    assert "{%" not in text and "{{" not in text
    assert "a model of 999,999 parameters" in card_of(tmp_path, total_parameters=999_999).lower()


def test_what_newer_metrics_and_a_run_file_say_is_told(tmp_path):
    (tmp_path / "run.toml").touch()
    kept = {"step": 90, "which": "best", "loss": 2.25}
    text = card_of(tmp_path, {"use_dora": True, "lora_plus": 16.0}, kept=kept, audit_failed="scale: it is off")
    assert "Kept: the adapter of step 90, where validation loss was lowest (2.250)." in text
    part = " ".join(card_of(tmp_path, {"strength": 0.65}, kept=kept).split())
    assert "where validation loss was lowest (2.250), its update scaled by 0.65." in part
    assert "Answers of the base and of this model" in text and "from that of the base." in text
    further = card_of(tmp_path, {"adapter": "/home/me/runs/first"})
    assert "/home/me" not in card_of(tmp_path, {"schema": "/home/me/x.json", "context": "/home/me/y.txt"})
    assert "/home/me" not in further and "Answers of the adapter that it was trained from and of this model" in further
    assert "changed by +5 % from that of the adapter that it was trained from." in further
    assert "cross-entropy in nats per token of the answers" in text
    assert "Loss is DPO's, for each pair" in card_of(tmp_path, {"loss": "dpo"})
    assert "a DoRA adapter" in text and "| `use_dora` | `true` |" in text and "| `lora_plus` | `16.0` |" in text
    assert "scale: it is off" in text and "--config run.toml" in text
    assert "What it learned" not in card_of(tmp_path, loss={}, keyword_recall={}, answers=[])  # nothing was measured
    assert "recall" not in card_of(tmp_path, keyword_recall={})


@pytest.mark.parametrize(
    ("data", "asked"),
    [
        ({}, [{"role": "user", "content": "..."}]),
        (
            {"template": 'Which "label", a {b}?\n\n{text}', "system": "Be brief."},
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Which "label", a {b}?\n\n...'}],
        ),
        ({"context_template": "{passage}: {question}!"}, [{"role": "user", "content": "...: ...!"}]),
    ],
)
def test_the_prompt_is_the_one_of_the_training_data(data, asked, tmp_path):
    (tmp_path / "minilora.json").write_text(json.dumps({"format": 1, "data": data}))
    (code,) = blocks(card_of(tmp_path), "python")
    (lines,) = re.findall(r"^((?:prompt|messages).*^)inputs", code, re.DOTALL | re.MULTILINE)
    names = {}
    exec(lines, names)
    assert names["messages"] == asked


def test_a_task_is_compared_with_the_other_contenders(tmp_path):
    share = {"value": 0.805, "low": 0.7, "high": 0.9}
    rows = [
        {"name": "base, 8-shot", "accuracy": share, "macro_f1": share | {"value": 0.25}},
        {"name": "TF-IDF", "missing": "not installed"},
    ]
    text = card_of(tmp_path, labels={"records": 312, "rows": rows})
    assert (
        "| 312 texts | accuracy, % | macro-F1, % |\n|---|--:|--:|\n| base, 8-shot | 80.5 [70.0, 90.0] | 25.0 [" in text
    )
    assert "TF-IDF" not in text
    rows = [{"name": "LoRA", "fields_right": share, "objects_right": share | {"value": 0.12}}]
    assert "| LoRA | 80.5 [70.0, 90.0] | 12.0 [" in card_of(tmp_path, fields={"records": 1, "rows": rows})


def test_every_set_of_questions_is_named_in_words(tmp_path):
    sets = {name: [3.0, 1.5] for name in TESTS}
    card = card_of(tmp_path, loss=sets, keyword_recall=sets, records={"train": 9} | dict.fromkeys(TESTS, 4))
    for name in TESTS:
        assert f"| loss, {HELD_OUT[name]} | 3.000 | 1.500 |" in card and f"keyword recall, {HELD_OUT[name]} |" in card
        assert USES[name] in card


def test_names_that_markdown_and_a_shell_would_misread_are_quoted(tmp_path):
    out = "my runs/it's"
    text = card_of(tmp_path, {"data": "a|b`c.jsonl", "out": out})
    assert "`` a\\|b`c.jsonl ``" in text
    words = [shlex.split(line) for block in blocks(text, "bash") for line in block.splitlines()]
    assert all(out in line for line in words if line[0] == "minilora")
    assert f'"{out}"' in blocks(text, "python")[0]
    assert f"# {Path.cwd().name}: a LoRA adapter" in card_of(tmp_path, {"out": "."})


PULLED = '"$(minilora pull smollm2)"'
BASES = [  # options -> the base with which llama.cpp loads the adapter; None where it can only load a merged model
    ({}, PULLED), ({"base": HUB}, PULLED), ({"base": "m/x.gguf"}, "m/x.gguf"),
    ({"base": "tiny"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("options", "base"), BASES, ids=str)
def test_llama_cpp_gets_the_adapter_where_it_can_hold_it_and_else_a_whole_model(options, base, tmp_path):
    command, model = ("export", f"{base} --lora legal.gguf") if base else ("merge", "legal.gguf")
    lines = [f"minilora {command} --adapter runs/legal --out legal.gguf", f"llama-cli -m {model} --temp 0"]
    assert blocks(card_of(tmp_path, options), "bash")[-1].splitlines() == lines


SCHEMA = {"type": "object", "properties": {"who's": {"type": "string"}}}
ASKED = [  # what decides how a model is asked -> llama.cpp's flags
    ({}, []),
    ({"system": "It's brief."}, ["-sys", "It's brief."]),
    ({"labels": ["a b", 'the "c"'], "template": "a b,\n{text}"},
     ["-p", "a b,\n...", "--grammar", r'root ::= "a b" | "the \"c\""']),
    ({"schema": SCHEMA, "template": "Who: {text}"}, ["-p", "Who: ...", "--json-schema", json.dumps(SCHEMA)]),
    ({"context_template": "{passage}: {question}!"}, ["-p", "...: ...!"]),
]  # fmt: skip


@pytest.mark.parametrize(("data", "flags"), ASKED, ids=str)
def test_llama_cpp_is_asked_as_in_training_and_gives_the_likeliest_of_the_possible_answers(data, flags, tmp_path):
    (tmp_path / "minilora.json").write_text(json.dumps({"format": 1, "data": data}))
    *_, commands = blocks(card_of(tmp_path, {"base": "m/x.gguf"}), "bash")
    words = shlex.split(commands.partition("\n")[2])
    assert words == ["llama-cli", "-m", "m/x.gguf", "--lora", "legal.gguf", *flags, "--temp", "0"]


@pytest.mark.parametrize("part", ["lora_magnitude_vector"])
def test_what_no_adapter_file_of_llama_cpp_can_hold_is_merged(part, tmp_path):
    *_, commands = blocks(card_of(tmp_path, holds=["lora_A.weight", "lora_B.weight", part]), "bash")
    assert commands == "minilora merge --adapter runs/legal --out legal.gguf\nllama-cli -m legal.gguf --temp 0\n"


def test_a_whole_model_is_loaded_as_one(tmp_path, monkeypatch):
    text = card_of(tmp_path, {"method": "full", "out": "runs/legal-full"})
    chat, llama_cpp = blocks(text, "bash")
    assert chat == "minilora chat --base runs/legal-full\n"
    monkeypatch.chdir(tmp_path)
    ml.save_model(*ml.load("tiny"), "runs/legal-full")
    write, ask = map(shlex.split, llama_cpp.splitlines())
    assert write[:2] == ["python", "-c"] and ask == ["llama-cli", "-m", "legal-full.gguf", "--temp", "0"]
    exec(write[2], {})
    assert Path("legal-full.gguf").is_file()
    assert "# legal-full: fine-tuned from SmolLM2-135M-Instruct" in text
    (code,) = blocks(text, "python")
    assert 'base = "runs/legal-full"' in code and "peft" not in code and "`r`" not in text


def test_a_gguf_base_reaches_transformers_merged(tmp_path):
    (tmp_path / "sha256-0a1b").write_bytes(b"GGUF")  # as ollama calls its files
    for base in ("m/x.gguf", str(tmp_path / "sha256-0a1b")):
        text = card_of(tmp_path, {"base": base})
        assert "minilora merge --adapter runs/legal --out legal-merged\n" in blocks(text, "bash")
        assert 'base = "legal-merged"' in blocks(text, "python")[0]


@pytest.mark.long
def test_a_run_writes_its_card_and_the_commands_in_it_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, TERMS)), encoding="utf-8")
    metrics = ml.finetune(Options(base="tiny", data="mine.jsonl", steps=2, eval_records=1, out="runs/mine"))
    text = (tmp_path / "runs" / "mine" / "README.md").read_text(encoding="utf-8")
    assert metrics["base_sha256"][0] in text and "a LoRA adapter for tiny" in text
    notes = json.loads((tmp_path / "runs" / "mine" / "minilora.json").read_text())
    digest = hashlib.sha256((tmp_path / "mine.jsonl").read_bytes()).hexdigest()
    assert notes["data"] == {"name": "mine.jsonl", "sha256": digest, "records": 8, "path": "../../mine.jsonl"}
    assert (notes["base"]["name"], notes["base"]["sha256"]) == ("tiny", metrics["base_sha256"][0])
    lines = [shlex.split(line) for block in blocks(text, "bash") for line in block.splitlines()]
    assert [line[1] for line in lines if line[0] == "minilora"] == ["chat", "merge"]
    (chat,) = [line[1:] for line in lines if line[:2] == ["minilora", "chat"]]
    assert main([*chat, "--prompt", "What is 1?", "--max-new-tokens", "2"]) == 0 and capsys.readouterr().out.strip()
    (merge,) = [line[1:] for line in lines if line[:2] == ["minilora", "merge"]]
    file = lines[-1][lines[-1].index("-m") + 1]
    assert main(merge) == 0 and (tmp_path / file).is_file()
    assert ml.load(tmp_path / file)[0].config.hidden_size == 128
