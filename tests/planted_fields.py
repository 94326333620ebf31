"""A data set with fields that are easy to find: each stands in the same words of its text."""

import json

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["bill", "parcel"]},
        "name": {"type": ["string", "null"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
}
NAMES = ("ann", "bob", "cy", "dee", "eve", "fay")


def planted_fields(path, tested=2):
    """Write it, with its schema next to it: of six names the last `tested` are tested, the one before validates."""
    rows = []
    for i, name in enumerate(NAMES):
        split = "test" if i >= len(NAMES) - tested else "validation" if i == len(NAMES) - tested - 1 else "train"
        for kind, word in (("bill", "pay"), ("parcel", "late")):
            fields = {"kind": kind, "name": name, "tags": [word, "x"]}
            rows += [
                {"text": f"{name}: {word} x", "fields": fields, "split": split},
                {"text": f"{word} x, says {name}", "fields": fields, "split": split},
            ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path.with_suffix(".schema.json").write_text(json.dumps(SCHEMA))
    return path
