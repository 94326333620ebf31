"""What tests of the command line share: a quick job, and what a command answered."""

from minilora.cli import main

LONG = "x" * 1200  # more tokens than the small model can see


def job(home, *flags):
    """The arguments of a quick finetune; a flag that is given takes the place of the one here."""
    usual = {"--base": home / "base", "--data": home / "data.jsonl", "--steps": 3, "--batch-size": 4}
    return ["finetune", *instead(usual, *flags)]


def instead(usual, *flags):
    """Words of flags, and of the usual ones that are not among them."""
    words = [word for name, value in usual.items() if name not in flags for word in (name, value)]
    return [str(word) for word in [*words, *flags]]


def status(*words):
    """The exit status of a command, also where argparse ends the program itself."""
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return end.code


def complaint(capsys):
    """The one line on stderr that says what went wrong; nothing else may be there, and nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minilora: ") and err.endswith("\n") and err.count("\n") == 1
    return err.removeprefix("minilora: ").strip()


def written(folder):
    return sorted(path.name for path in folder.iterdir())


def columns(page):
    return max(map(len, page.split("\n")))
