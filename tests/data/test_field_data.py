"""The messages with fields are what their card says: values fit the schema and are in the text, splits are apart."""

import json
import re
from collections import Counter

import pytest
from asking import DATA, rows_of

from minilora.data.records import read_records

CARD = (DATA / "SKILLS.md").read_text(encoding="utf-8")
DOMAINS = sorted(path.name.partition("-")[0] for path in DATA.iterdir() if path.name.endswith("-fields.jsonl"))
each_domain = pytest.mark.parametrize("domain", DOMAINS)


def records_of(domain):
    return rows_of(f"{domain}-fields")


def schema_of(domain):
    return json.loads((DATA / f"{domain}-fields.schema.json").read_text(encoding="utf-8"))


def stated(value, rule, text):
    """Whether a value is in the text, if it is none of a given set: the exact words, or the number."""
    if value is None or "enum" in rule:
        return True
    if isinstance(value, list):
        return len(set(value)) == len(value) and all(one and one in text for one in value)
    if isinstance(value, str):
        return value.strip() == value != "" and value in text
    return value in {float(number) for number in re.findall(r"\d+(?:\.\d+)?", re.sub(r"(\d),(\d{3})", r"\1\2", text))}


@each_domain
def test_every_value_fits_the_schema_and_is_in_the_text_of_50_words_at_most(domain):
    schema = schema_of(domain)
    rules = schema["properties"]
    assert 4 <= len(rules) <= 6 and schema["required"] == list(rules) and schema["additionalProperties"] is False
    for record, read in zip(records_of(domain), read_records(f"{domain}-fields"), strict=True):
        fields, text = record["fields"], record["text"]
        assert list(fields) == list(rules) and len(text.split()) <= 50, text
        assert [n for n, value in fields.items() if not stated(value, rules[n], text)] == [], text
        assert read.fields.keys() <= fields.keys(), text  # reading refuses a value that does not fit


@each_domain
def test_every_field_is_often_filled_and_every_choice_occurs_in_train_and_test(domain):
    rules, records = schema_of(domain)["properties"], records_of(domain)
    for name, rule in rules.items():
        for split, least in (("train", 8), ("test", 3)):
            values = [record["fields"][name] for record in records if record["split"] == split]
            if "enum" in rule:
                count = Counter(values)
                assert min(count[choice] for choice in rule["enum"]) >= least, (name, split, count)
            else:
                filled = sum(value not in (None, []) for value in values) / len(values)
                assert filled >= 0.2, (name, split, filled)


def test_all_files_of_skills_are_small_together():
    sizes = [len(path.read_bytes()) for path in DATA.iterdir() if re.search(r"-(labels|fields)\.", path.name)]
    assert sum(sizes) < 2_100_000


@each_domain
def test_the_card_describes_every_field(domain):
    section = CARD.partition(f"### {domain}-fields")[2].partition("\n#")[0]
    assert re.findall(r"^\| `([a-z_]+)` \|", section, re.MULTILINE) == list(schema_of(domain)["properties"])
