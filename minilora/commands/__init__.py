"""The commands, a file each: HELP, one line; `add`, its flags; `run`, what it does. `cli` finds them by name."""

NAMES = (  # in the order in which `minilora --help` lists them
    "finetune", "compare", "sweep", "chat", "serve", "site", "data", "predict", "eval", "audit", "merge", "export",
    "report", "runs", "memory", "pull", "bench", "reproduce", "gradcheck", "course", "progress",
)  # fmt: skip
