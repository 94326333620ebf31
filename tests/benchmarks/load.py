"""`minilora serve` under load: tokens per second in all, and the time to the first token, for 1, 4 and 16 clients.

    pip install '.[serve]'             # and '.[benchmarks]', for transformers and PEFT as well
    python tests/benchmarks/load.py    # four random adapters of r=8 on SmolLM2
    python tests/benchmarks/load.py --base tiny --clients 1 16
    python tests/benchmarks/load.py --adapter legal=runs/legal medical=runs/medical ...

Each client asks, reads its answer to the end, and asks again. Over four adapters they answer in turns; in addition, the
same questions are all put to one of them. transformers and PEFT answer the same requests one by one, each after
`set_adapter`, and as the one mixed batch that PEFT computes when all ask at the same moment (`adapter_names`).
"""

import argparse
import http.client
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import minilora as ml
from minilora.data.records import DOMAINS
from minilora.models.folder import save_folder
from minilora.models.load import load
from minilora.models.with_adapters import named_folders

# -- what is asked -----------------------------------------------------------------------------------------------------


def random_adapters(base, folder):
    """Four adapters whose updates are not nothing: their speed is that of trained ones."""
    model, _ = load(base)
    for seed, name in enumerate(DOMAINS):
        config = ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        ml.add_adapter(model, config, name=name, seed=seed)
        for key, array in ml.adapter_state(model, name).items():
            if key.endswith("lora_B"):
                array += 1e-3
        ml.save_adapter(model, Path(folder, name), name=name)
        ml.remove_adapter(model, name)
    return {name: Path(folder, name) for name in DOMAINS}


def requests(names, clients, rounds, one):
    """Who asks whom what: for each client its (adapter, question) in order. one: all ask the first adapter."""
    questions = {
        name: [record.prompt[-1]["content"] for record in ml.read_records(name if name in DOMAINS else "legal")]
        for name in names
    }
    asked = []
    for client in range(clients):
        own = names[client % len(names)]
        mine = [questions[own][(client // len(names) + clients * i) % len(questions[own])] for i in range(rounds)]
        asked.append([(names[0] if one else own, question) for question in mine])
    return asked


# -- the server --------------------------------------------------------------------------------------------------------


@contextmanager
def served(base, folders, slots, *flags):
    """The port of a server in its own process."""
    adapters = [word for name, folder in folders.items() for word in ("--adapter", f"{name}={folder}")]
    command = [sys.executable, "-m", "minilora", "serve", "--base", str(base), "--port", "0", "--slots", str(slots)]
    process = subprocess.Popen([*command, *adapters, *flags], stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            sys.exit("the server did not start")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield int(found[1])
    finally:
        process.terminate()
        process.wait(30)


def ask(connection, adapter, question, tokens):
    """Number of tokens, and seconds to the first, of one answer."""
    body = {"model": adapter, "messages": [{"role": "user", "content": question}], "max_tokens": tokens}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    began, first, count = time.perf_counter(), None, 0
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        sys.exit(response.read().decode())
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        if first is None and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
            first = time.perf_counter() - began
        if chunk.get("usage"):
            count = chunk["usage"]["completion_tokens"]
    return count, first


def measure_server(port, asked, tokens):
    """Tokens per second of all clients together, and the seconds to the first token of each answer."""
    results, began = [], time.perf_counter()

    def client(own):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        results.extend(ask(connection, adapter, question, tokens) for adapter, question in own)
        connection.close()

    threads = [threading.Thread(target=client, args=[own]) for own in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    return sum(count for count, _ in results) / seconds, [first for _, first in results if first is not None]


# -- transformers and PEFT ---------------------------------------------------------------------------------------------


class Peft:
    """The same base and adapters in transformers and PEFT."""

    def __init__(self, base, folders, place):
        os.environ["HF_HUB_OFFLINE"] = "1"
        import peft
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model, self.tokenizer = load(base)
        save_folder(Path(place), model.config, model.state_dict(), self.tokenizer)
        self.torch, self.transformers = torch, transformers
        plain = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        (first, folder), *others = folders.items()
        self.model = peft.PeftModel.from_pretrained(plain, str(folder), adapter_name=first).eval()
        for name, folder in others:
            self.model.load_adapter(str(folder), adapter_name=name)

    def generate(self, rows, tokens, **more):
        """Tokens in all, seconds to the first, and seconds to the end, of (adapter, question) rows as one batch."""
        torch, firsts = self.torch, []
        prompts = [self.tokenizer.encode_chat([{"role": "user", "content": q}], answer_next=True) for _, q in rows]
        longest, pad = max(map(len, prompts)), self.tokenizer.pad_id
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

        class First(self.transformers.StoppingCriteria):
            def __call__(self, ids, scores, **rest):
                firsts.append(time.perf_counter())
                return torch.zeros(len(ids), dtype=torch.bool)

        began = time.perf_counter()
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=pad,
                eos_token_id=self.tokenizer.eos_id, stopping_criteria=[First()], **more,
            )  # fmt: skip
        ended = time.perf_counter()
        count = 0
        for row in out[:, longest:].tolist():
            count += row.index(self.tokenizer.eos_id) if self.tokenizer.eos_id in row else len(row)
        return count, firsts[0] - began, ended - began

    def one_by_one(self, asked, tokens):
        """Requests in the order in which clients that take turns would ask; each waits for those before it."""
        total, now, ends, firsts = 0, 0.0, {}, []
        for turn in range(len(asked[0])):
            for client, own in enumerate(asked):
                self.model.set_adapter(own[turn][0])
                count, first, seconds = self.generate([own[turn]], tokens)
                firsts.append(now + first - ends.get(client, 0.0))
                now, total = now + seconds, total + count
                ends[client] = now
        return total / now, firsts

    def batched(self, asked, tokens):
        """All clients ask at the same moment, and are answered when the longest answer has ended."""
        total, seconds, firsts = 0, 0.0, []
        for rows in zip(*asked, strict=True):
            count, first, took = self.generate(list(rows), tokens, adapter_names=[name for name, _ in rows])
            total, seconds = total + count, seconds + took
            firsts += [first] * len(rows)
        return total / seconds, firsts


# -- the table ---------------------------------------------------------------------------------------------------------


def summary(turns):
    """Medians of the turns: tokens per second, seconds to the first token."""
    return {
        "tokens_per_second": statistics.median(speed for speed, _ in turns),
        "first_token_seconds": statistics.median(first for _, firsts in turns for first in firsts),
        "first_token_seconds_worst": max(first for _, firsts in turns for first in firsts),
    }


def table(result):
    """The numbers as text."""
    ways = {
        "four": f"minilora serve, {len(result['adapters'])} adapters",
        "one": "minilora serve, one adapter",
        "peft": "transformers + PEFT, one by one",
        "peft_batched": "transformers + PEFT, one mixed batch",
    }
    head = f"{'':38}{'clients':>8}{'tokens/s':>10}{'to the first token, median and worst':>40}"
    lines = [f"{result['base']}, answers of up to {result['tokens']} tokens, {result['machine']}", "", head]
    for way, title in ways.items():
        for clients, got in result["measured"].get(way, {}).items():
            first = f"{got['first_token_seconds']:.3f} s {got['first_token_seconds_worst']:.3f} s"
            lines.append(f"{title:38}{clients:>8}{got['tokens_per_second']:>10.1f}{first:>40}")
            title = ""
    four = result["measured"]["four"]
    few, many = min(four, key=int), max(four, key=int)
    ratio = four[many]["tokens_per_second"] / four[few]["tokens_per_second"]
    lines += ["", f"{many} clients get {ratio:.1f} times the tokens/s of {few}"]
    return "\n".join(lines)


def main():
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2", help="default: %(default)s")
    parser.add_argument("--adapter", nargs="+", default=[], metavar="NAME=DIR", help="default: four random ones")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16], help="default: 1 4 16")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most (default: %(default)s)")
    parser.add_argument("--answers", type=int, default=2, help="that each client reads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of everything (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="minilora computes in bfloat16")
    parser.add_argument("--no-peft", action="store_true", help="minilora alone")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON")
    given = parser.parse_args()
    peers = ("torch", "transformers", "peft")
    with_peft = not given.no_peft and all(map(find_spec, peers))
    turns = {}
    with tempfile.TemporaryDirectory() as place:
        folders = named_folders(given.adapter) or random_adapters(given.base, place)
        names = list(folders)
        ways = [("four", False), ("one", True)]
        with served(given.base, folders, max(given.clients), *["--bf16"] * given.bf16) as port:
            measure_server(port, requests(names, 1, 1, False), 4)  # warm
            for _ in range(given.rounds):
                for way, one in ways:
                    for clients in given.clients:
                        asked = requests(names, clients, given.answers, one)
                        turns.setdefault(way, {}).setdefault(str(clients), []).append(
                            measure_server(port, asked, given.tokens)
                        )
        if with_peft:
            peft = Peft(given.base, folders, Path(place, "copy"))
            peft.generate([(names[0], "Who?")], 4)  # warm
            for _ in range(given.rounds):
                for way, measure in (("peft", peft.one_by_one), ("peft_batched", peft.batched)):
                    for clients in given.clients:
                        asked = requests(names, clients, given.answers, False)
                        turns.setdefault(way, {}).setdefault(str(clients), []).append(measure(asked, given.tokens))
    result = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in ("numpy", *(peers if with_peft else ()))},
        "base": given.base,
        "adapters": names,
        "tokens": given.tokens,
        "answers": given.answers,
        "rounds": given.rounds,
        "measured": {way: {n: summary(own) for n, own in sizes.items()} for way, sizes in turns.items()},
    }
    print(json.dumps(result, indent=2) if given.json else table(result))


if __name__ == "__main__":
    main()
