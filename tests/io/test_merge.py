"""Merged models as files: what was computed before is computed after, nothing is half written, losses are said."""

import dataclasses
import json

import gguf
import numpy as np
import pytest
from modelfiles import CHATML, CONFIG, SPECIAL, byte_symbols, stored_as, write_gguf
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core

from minilora.cli import main
from minilora.engine.tensor import no_grad
from minilora.files.disk import ModelFileError
from minilora.io import zoo
from minilora.io.folder import save_folder
from minilora.io.gguf import GGUF, save_gguf
from minilora.io.merge import export, merge, requantised
from minilora.io.tokenizer import Tokenizer, tokenizer_metadata
from minilora.lora.adapters import adapter_state, add_adapter, merge_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter, save_adapter
from minilora.nn.llama import Llama

IDS = np.arange(24).reshape(2, 12) * 13 % CONFIG.vocab_size
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("1", "2")]
QUERY = "model.layers.0.self_attn.q_proj.weight"
TEXTS = ["hello 12 hello", "  naïve\n\n<|im_start|>user 345<|im_end|>", "東京 ½²", ""]


def new_model(**changes):
    """A random Llama whose attention is far from uniform, so that the order of rotary pairs shows."""
    model = Llama(dataclasses.replace(CONFIG, **changes), np.random.default_rng(0))
    for _, parameter in model.named_parameters():
        parameter.data = parameter.data * np.float32(10 if parameter.ndim == 2 else 1)
    return model


def new_words(digits=True, pad=0, bos="<|im_start|>", merges=MERGES):
    """A byte-level BPE tokenizer as a Hugging Face folder has it."""
    symbols = [symbol for _, symbol in sorted(byte_symbols().items())]
    tokens = [*SPECIAL, *symbols, *("".join(merge) for merge in merges)]
    core = Core(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [pre_tokenizers.Digits(individual_digits=True), by_bytes]
    core.pre_tokenizer = pre_tokenizers.Sequence(steps) if digits else by_bytes
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return Tokenizer(core, eos="<|im_end|>", template=CHATML, bos=bos, pad_id=pad)


def adapted(model, size=0.2, **settings):
    """The model with an adapter that changes its output."""
    add_adapter(model, LoraConfig(**({"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings)))
    for array in adapter_state(model, "default").values():
        array *= np.float32(size)
    return model


def logits(model):
    with no_grad():
        return model(IDS).data


@pytest.fixture
def folder(tmp_path):
    return save_folder(tmp_path / "base", CONFIG, new_model().state_dict(), new_words())


@pytest.fixture
def adapter(tmp_path):
    return save_adapter(adapted(new_model()), tmp_path / "adapter")


def expected_logits(base, adapter):
    """Of base and adapter side by side, and of the two merged in memory."""
    model, _ = zoo.load(base)
    load_adapter(model, adapter)
    beside = logits(model)
    merge_adapter(model)
    return beside, logits(model)


# -- merge -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize("base", ["folder", "F32", "Q8_0", "Q4_1"])
def test_a_merged_model_in_float32_has_the_merged_logits_bit_for_bit(base, format, folder, adapter, tmp_path):
    base = folder if base == "folder" else write_gguf(tmp_path / "base.gguf", new_model(), base)
    out = tmp_path / ("merged.gguf" if format == "gguf" else "merged")
    report = merge(base, adapter, out, kind="F32")
    beside, inside = expected_logits(base, adapter)
    model, words = zoo.load(out)
    assert logits(model).tobytes() == inside.tobytes() and report.logit_error == 0
    assert np.abs(inside - beside).max() < 1e-3
    assert np.abs(inside - logits(zoo.load(base)[0])).max() > 0.1
    assert "bit for bit" in str(report)
    original = zoo.load(base)[1]
    for text in TEXTS if base.is_dir() else TEXTS[:1]:
        assert words.encode(text) == original.encode(text)
    assert (words.eos, words.bos, words.pad_id, words.template) == (
        original.eos,
        original.bos,
        original.pad_id,
        original.template,
    )


@pytest.mark.parametrize(("kind", "limit"), [("F16", 2e-3), ("Q8_0", 5e-2), ("Q4_1", 0.5)])
def test_other_types_stay_within_their_rounding_and_say_how_far(kind, limit, folder, adapter, tmp_path):
    report = merge(folder, adapter, tmp_path / "merged.gguf", kind=kind)
    _, inside = expected_logits(folder, adapter)
    error = np.abs(logits(zoo.load(report.path)[0]) - inside).max()
    assert 0 < error < limit * np.abs(inside).max()
    assert 0 < report.logit_error < limit * report.logit_size
    assert f"{report.logit_error:.2g}" in str(report)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(report.path).tensors}
    assert kinds["blk.0.ffn_up.weight"] == kind and kinds["blk.0.attn_norm.weight"] == "F32"


def test_a_folder_in_float16(folder, adapter, tmp_path):
    report = merge(folder, adapter, tmp_path / "merged", kind="f16")
    assert json.loads((report.path / "config.json").read_text())["dtype"] == "float16"
    assert 0 < report.logit_error < 2e-3 * report.logit_size


def test_an_embedding_adapter_on_a_tied_model_unties_it(folder, tmp_path):
    adapter = save_adapter(adapted(new_model(), target_modules=["embed_tokens", "q_proj"]), tmp_path / "adapter")
    for name in ("merged", "merged.gguf"):
        report = merge(folder, adapter, tmp_path / name, kind="F32")
        model, _ = zoo.load(report.path)
        assert not model.config.tie_word_embeddings and report.logit_error == 0
        np.testing.assert_allclose(logits(model), expected_logits(folder, adapter)[0], atol=2e-4)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"use_rslora": True}], ids=str
)
def test_variants_are_merged(settings, folder, tmp_path):
    adapter = save_adapter(adapted(new_model(), 1.1, **settings), tmp_path / "adapter")
    report = merge(folder, adapter, tmp_path / "merged.gguf", kind="F32")
    assert report.logit_error == 0
    np.testing.assert_allclose(
        logits(zoo.load(report.path)[0]), expected_logits(folder, adapter)[0], rtol=1e-4, atol=1e-3
    )


def test_what_a_gguf_base_says_is_copied_with_its_types(tmp_path, adapter):
    change = {"general.name": "Small", "llama.vocab_size": 320, "tokenizer.chat_template": CHATML}
    file = write_gguf(tmp_path / "base.gguf", new_model(), "Q8_0", change=change)
    out = merge(file, adapter, tmp_path / "merged.gguf").path
    old, new = (
        {k: (f.contents(), f.types) for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
        for path in (file, out)
    )
    assert new.pop("general.file_type")[0] == 1 and new.pop("general.quantization_version")[0] == 2
    assert new.pop("general.type")[0] == "model"
    assert new == old


def test_matrices_that_the_adapter_leaves_alone_keep_their_packed_bytes(tmp_path):
    adapter = save_adapter(adapted(new_model(), target_modules=["q_proj"]), tmp_path / "adapter")
    file = write_gguf(tmp_path / "base.gguf", new_model(), "Q4_1")
    for kind in ("Q8_0", "Q4_1"):
        out = merge(file, adapter, tmp_path / f"{kind}.gguf", kind=kind).path
        old, new = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (file, out))
        for name, tensor in old.items():
            if "attn_q" in name:
                assert new[name].tensor_type.name == kind
            else:
                assert new[name].data.tobytes() == tensor.data.tobytes(), name


# -- what four bits lose -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.02, 0.2])
def test_the_loss_of_requantising_is_that_of_the_gguf_library(size, tmp_path):
    model, quant = adapted(new_model(), size, target_modules=["q_proj", "up_proj"]), gguf.GGMLQuantizationType.Q4_1
    adapter = save_adapter(model, tmp_path / "adapter")
    file = write_gguf(tmp_path / "base.gguf", new_model(), "Q4_1")
    report = merge(file, adapter, tmp_path / "merged.gguf", kind="F32")
    base = stored_as(new_model().state_dict(), "Q4_1")
    merged = zoo.load(report.path)[0].state_dict()
    rounding = update = same = count = 0
    for name in (name for name in base if "q_proj" in name or "up_proj" in name):
        packed = gguf.quants.quantize(merged[name], quant)
        own = gguf.quants.quantize(new_model().state_dict()[name], quant)
        rounding += ((gguf.quants.dequantize(packed, quant) - merged[name]) ** 2).sum()
        update += ((merged[name] - zoo.load(file)[0].state_dict()[name]) ** 2).sum()
        a, b = (x.reshape(-1, 20)[:, 4:] for x in (packed, own))
        same += (a & 15 == b & 15).sum() + (a >> 4 == b >> 4).sum()
        count += merged[name].size
    lost = report.requantised
    assert lost.matrices == 4
    assert lost.error == pytest.approx(np.sqrt(rounding / update), rel=0.01)
    assert lost.codes_kept == pytest.approx(same / count, abs=1e-3)


def test_a_small_update_is_swallowed_by_four_bits_and_a_large_one_is_not(tmp_path):
    lost = []
    for size in (0.002, 0.5):
        model = adapted(new_model(), size)
        before = {name: p.data for name, p in model.named_parameters() if ".adapters." not in name}
        merge_adapter(model)
        after = {name: p.data for name, p in model.named_parameters() if ".adapters." not in name}
        changed = {name for name in after if after[name] is not before[name]}
        lost.append(requantised(before, after, changed, CONFIG))
    assert lost[0].error > 5 and lost[0].codes_kept > 0.98
    assert lost[1].error < 1 and lost[1].codes_kept < 0.5


def test_nothing_to_lose_is_no_division_by_zero():
    state = new_model().state_dict()
    assert requantised(state, state, {QUERY}, CONFIG).error == 0
    assert requantised(state, state, set(), CONFIG).codes_kept == 1


def test_merging_into_four_bits_writes_float_unless_asked_and_says_what_would_be_lost(tmp_path, adapter, capsys):
    file = write_gguf(tmp_path / "base.gguf", new_model(), "Q4_1")
    arguments = ["merge", "--base", str(file), "--adapter", str(adapter)]
    assert main([*arguments, "--out", str(tmp_path / "float.gguf")]) == 0
    page = capsys.readouterr().out
    assert "F16" in page and "would have" in page and "% of their codes" in page and "would be" in page
    assert main([*arguments, "--out", str(tmp_path / "four.gguf"), "--type", "q4_1"]) == 0
    page = capsys.readouterr().out
    assert "Q4_1" in page and "would" not in page and "% of their codes" in page
    kinds = [{t.tensor_type.name for t in gguf.GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in ("float", "four")]
    assert kinds[0] == {"F16", "F32"} and "Q4_1" in kinds[1]


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_base_that_is_not_in_four_bits_is_told_nothing_of_them(kind, tmp_path, adapter):
    file = write_gguf(tmp_path / "base.gguf", new_model(), kind)
    assert merge(file, adapter, tmp_path / "merged.gguf").requantised is None


# -- export ------------------------------------------------------------------------------------------------------------


def test_export_writes_an_adapter_that_computes_the_same(folder, adapter, tmp_path, capsys):
    out = tmp_path / "adapter.gguf"
    assert main(["export", "--base", str(folder), "--adapter", str(adapter), "--out", str(out)]) == 0
    assert "14 matrices" in capsys.readouterr().out
    models = [zoo.load(folder)[0] for _ in range(2)]
    for model, path in zip(models, (adapter, out), strict=True):
        load_adapter(model, path)
    assert logits(models[0]).tobytes() == logits(models[1]).tobytes()


def test_an_exported_adapter_can_be_merged_and_both_ways_agree(folder, adapter, tmp_path):
    out = export(folder, adapter, tmp_path / "adapter.gguf").path
    first = merge(folder, adapter, tmp_path / "first.gguf", kind="F32").path
    second = merge(folder, out, tmp_path / "second.gguf", kind="F32").path
    assert first.read_bytes() == second.read_bytes()


def test_export_refuses_what_llama_cpp_cannot_compute(folder, tmp_path, capsys):
    adapter = save_adapter(adapted(new_model(), use_dora=True), tmp_path / "adapter")
    out = tmp_path / "adapter.gguf"
    assert main(["export", "--base", str(folder), "--adapter", str(adapter), "--out", str(out)]) == 1
    assert "DoRA" in capsys.readouterr().err and not out.exists()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "flags", "words"),
    [
        ("merged", ["--type", "q8_0"], ("hf", "Q8_0", "F32, F16")),
        ("merged", ["--type", "q4_1"], ("Q4_1",)),
        ("merged.gguf", ["--format", "hf", "--type", "q8_0"], ("Q8_0",)),
    ],
)
def test_a_type_that_the_format_does_not_have_is_a_wrong_argument(out, flags, words, folder, adapter, tmp_path, capsys):
    arguments = ["merge", "--base", str(folder), "--adapter", str(adapter), "--out", str(tmp_path / out), *flags]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)
    assert not (tmp_path / out).exists()


def test_neither_base_nor_adapter_nor_other_files_are_written_over(folder, adapter, tmp_path):
    file = write_gguf(tmp_path / "base.gguf", new_model())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for base, out, word in (
        (folder, folder, "base itself"),
        (folder, adapter, "new or empty"),  # transformers would add the adapter a second time
        (file, file, "base itself"),
        (folder, folder / "config.json", "new or empty"),
    ):
        with pytest.raises(ValueError, match=word):
            merge(base, adapter, out)
    with pytest.raises(ValueError, match="base itself"):
        export(file, adapter, file)
    with pytest.raises(ValueError, match="must end in .gguf"):
        export(folder, adapter, tmp_path / "adapter.bin")
    with pytest.raises(ValueError, match="must end in .gguf"):
        merge(folder, adapter, tmp_path / "merged", format="gguf")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_adapter_that_is_missing_is_one_line_and_nothing_is_written(folder, tmp_path, capsys):
    arguments = ["--base", str(folder), "--adapter", str(tmp_path / "absent"), "--out", str(tmp_path / "x.gguf")]
    for command in ("merge", "export"):
        assert main([command, *arguments]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "absent" in error
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_numbers_that_the_type_cannot_hold_are_refused_by_name(kind, tmp_path):
    state = new_model().state_dict() | {QUERY: np.full((32, 32), 1e9, np.float32)}
    with pytest.raises(ValueError, match=QUERY):
        save_gguf(tmp_path / "x.gguf", CONFIG, state, new_words(), kind)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_no_whole_blocks_are_stored_as_float16(tmp_path):
    config = dataclasses.replace(CONFIG, intermediate_size=48)
    model = Llama(config, np.random.default_rng(0))
    path = save_gguf(tmp_path / "x.gguf", config, model.state_dict(), new_words(), "Q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    assert np.abs(logits(GGUF(path).load()) - logits(model)).max() < 0.05


# -- files appear whole or not at all ----------------------------------------------------------------------------------


def test_a_failed_merge_leaves_no_folder_and_no_file(folder, adapter, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minilora.io.folder.write_tensors", full)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    for name in ("merged", "merged.gguf"):
        with pytest.raises(OSError, match="No space"):
            merge(folder, adapter, tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


def test_an_empty_folder_is_filled(folder, adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    assert merge(folder, adapter, tmp_path / "merged").path.is_dir()


# -- the tokenizer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [{}, {"digits": False}, {"bos": ""}, {"pad": 2}], ids=str)
def test_a_tokenizer_comes_back_from_a_gguf_file(words, tmp_path):
    words = new_words(**words)
    path = save_gguf(tmp_path / "x.gguf", CONFIG, new_model().state_dict(), words)
    again = zoo.load(path)[1]
    for text in TEXTS:
        assert again.encode(text) == words.encode(text)
        assert again.decode(again.encode(text)) == words.decode(words.encode(text))
    assert (again.eos, again.bos, again.pad_id) == (words.eos, words.bos, words.pad_id)
    messages = [{"role": "user", "content": "hello 12"}]
    assert again.encode_chat(messages, answer_next=True) == words.encode_chat(messages, answer_next=True)


def test_ids_without_a_token_are_padded_as_unused():
    words = new_words()
    meta = tokenizer_metadata(words, CONFIG.vocab_size)
    assert len(meta["tokenizer.ggml.tokens"]) == len(set(meta["tokenizer.ggml.tokens"])) == CONFIG.vocab_size
    assert set(meta["tokenizer.ggml.token_type"][len(words) :]) == {5}
    assert meta["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]


def changed(change):
    words = new_words()
    change(words.core)
    return words


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (changed(lambda core: setattr(core, "normalizer", normalizers.NFC())), "normalizer"),
        (changed(lambda core: setattr(core, "decoder", decoders.Fuse())), "byte-level"),
        (
            changed(lambda core: setattr(core, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))),
            "words",
        ),
        (changed(lambda core: setattr(core, "pre_tokenizer", pre_tokenizers.Whitespace())), "words"),
        (changed(lambda core: setattr(core.model, "ignore_merges", True)), "ignore_merges"),
        (changed(lambda core: core.add_tokens(["plain"])), "'plain'"),
        (new_words(merges=[]), "no merges"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_run_differently_is_refused(words, reason):
    with pytest.raises(ModelFileError, match=reason):
        tokenizer_metadata(words, CONFIG.vocab_size)
