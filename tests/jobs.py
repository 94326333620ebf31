"""What tests of the jobs share: options of a quick one, a question as a conversation."""

from minilora.train.options import Options


def asked(question):
    return [{"role": "user", "content": question}]


def options(home, out, **change):
    """Options of a job on the base and data of the folder `home`."""
    values = dict(base=str(home / "base"), data=str(home / "data.jsonl"), out=str(out), r=2, steps=6, batch_size=4)
    values |= {"strength": 1.0} if change.get("method", "lora") == "lora" else {}  # what is kept is what was trained
    return Options(**(values | change))
