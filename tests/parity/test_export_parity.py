"""Parity of exports: transformers and PEFT compute with what minilora merged and saved, and know the same keys."""

import dataclasses
import json

import numpy as np
import pytest
from modelfiles import IDS, new_llama, new_tokenizer
from otherside import distance, logits_of, parity, peft, torch, transformers, with_peft
from peftfiles import adapted
from smallmodels import shaken

from minilora.lora.config import RECORDED, UNSUPPORTED, LoraConfig
from minilora.lora.peft import load_adapter, save_adapter
from minilora.models import load as zoo
from minilora.models.folder import save_folder
from minilora.models.merge import export, merge

pytestmark = parity

SETTINGS = {
    "every linear layer": {},
    "rsLoRA": {"use_rslora": True, "target_modules": ["q_proj", "k_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "DoRA": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "PiSSA": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj"]},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


@pytest.fixture(params=[True, False], ids=["tied head", "untied head"])
def base(request, tmp_path):
    """The folder of a small random model with a byte-level tokenizer that splits digits."""
    model = new_llama(tie_word_embeddings=request.param)
    return save_folder(tmp_path / "base", model.config, model.state_dict(), new_tokenizer())


@pytest.fixture
def adapter(base, tmp_path, settings):
    return save_adapter(shaken(adapted(zoo.load(base)[0], **settings), seed=1), tmp_path / "adapter")


def transformers_model(folder, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


@every_setting
def test_a_merged_folder_gives_pefts_logits_in_transformers(base, adapter, tmp_path):
    plain = logits_of(transformers_model(base, dtype=torch.float32), IDS)
    beside = peft.PeftModel.from_pretrained(transformers_model(base, dtype=torch.float32), adapter).eval()
    expected = logits_of(beside, IDS)
    assert distance(expected, plain) > 0.1
    limit = 1e-4 * max(1, np.abs(expected).max())
    ours, _ = zoo.load(base)
    load_adapter(ours, adapter)
    assert distance(ours(IDS).data, expected) < limit
    out = merge(base, adapter, tmp_path / "merged").path
    merged = transformers_model(out)
    assert merged.dtype == torch.float32
    assert distance(logits_of(merged, IDS), expected) < limit
    if "lm_head.weight" in zoo.load(out)[0].state_dict() and zoo.load(base)[0].config.tie_word_embeddings:
        return  # PEFT's own merge would now change the tied head as well, and with it every logit
    assert distance(logits_of(beside.merge_and_unload(), IDS), logits_of(merged, IDS)) < limit


@pytest.mark.parametrize("settings", [{}])
def test_a_merged_folder_in_float16_loads_in_transformers(base, adapter, tmp_path):
    merged = transformers_model(merge(base, adapter, tmp_path / "merged", kind="F16").path)
    assert merged.dtype == torch.float16
    ours, _ = zoo.load(tmp_path / "merged")
    assert distance(logits_of(merged.float(), IDS), ours(IDS).data) < 1e-3


@pytest.mark.parametrize("settings", [{}])
def test_the_tokenizer_of_a_merged_folder_is_the_bases(base, adapter, tmp_path):
    out = merge(base, adapter, tmp_path / "merged").path
    theirs, (_, ours) = transformers.AutoTokenizer.from_pretrained(out), zoo.load(base)
    for text in ("hello 12, he said", "naïve <|im_end|>\n"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
    messages = [{"role": "user", "content": "hello"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == ours.render(messages)


@pytest.mark.parametrize("settings", [{}, SETTINGS["patterns"]], ids=["plain", "patterns"])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_a_merged_gguf_file_is_read_by_transformers_as_here(kind, base, adapter, tmp_path):
    """transformers reads GGUF with its own code, so that a mistake in layout or packing shows."""
    out = merge(base, adapter, tmp_path / "merged.gguf", kind=kind).path
    theirs = transformers_model(tmp_path, gguf_file=out.name, dtype=torch.float32)
    ours, _ = zoo.load(out)
    got = dict(theirs.named_parameters())
    for name, array in ours.state_dict().items():
        np.testing.assert_array_equal(array, got[name].detach().numpy(), err_msg=name)
    assert distance(logits_of(theirs, IDS), ours(IDS).data) < 1e-3


@pytest.mark.parametrize(
    "settings", [{}, SETTINGS["rsLoRA"], SETTINGS["patterns"]], ids=["plain", "rsLoRA", "patterns"]
)
def test_an_adapter_that_went_through_llama_cpps_format_means_the_same_in_peft(base, adapter, tmp_path):
    expected = logits_of(peft.PeftModel.from_pretrained(transformers_model(base), adapter).eval(), IDS)
    model, _ = zoo.load(base)
    load_adapter(model, export(base, adapter, tmp_path / "adapter.gguf").path)
    again = save_adapter(model, tmp_path / "again")
    got = logits_of(peft.PeftModel.from_pretrained(transformers_model(base), again).eval(), IDS)
    assert distance(got, expected) < 1e-4 * max(1, np.abs(expected).max())


def test_every_key_that_peft_writes_has_a_fate_here(tmp_path):
    """A key of a newer PEFT shows up here before it can be dropped or misread."""
    theirs = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"]).to_dict()
    assert LoraConfig(**theirs) == LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    keys = set(theirs)
    own = {field.name for field in dataclasses.fields(LoraConfig)}
    assert keys <= own | RECORDED | UNSUPPORTED.keys()
    assert not own & (RECORDED | UNSUPPORTED.keys())
    assert not RECORDED & UNSUPPORTED.keys()


def test_pefts_defaults_are_accepted_and_survive_loading_and_saving(base, tmp_path):
    theirs = with_peft(transformers_model(base), r=4, target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path / "theirs")
    record = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    model, _ = zoo.load(base)
    load_adapter(model, tmp_path / "theirs")
    again = save_adapter(model, tmp_path / "again")
    assert json.loads((again / "adapter_config.json").read_text()) == record
    peft.PeftModel.from_pretrained(transformers_model(base), again)


def test_a_pissa_adapter_that_peft_saved_unconverted_finds_its_start_again_here(base, tmp_path):
    settings = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "pissa"}
    theirs = with_peft(transformers_model(base), r=4, lora_alpha=8, **settings).eval()
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "theirs")
    model, _ = zoo.load(base)
    load_adapter(model, tmp_path / "theirs")
    assert distance(model(IDS).data, logits_of(theirs, IDS)) < 1e-3
