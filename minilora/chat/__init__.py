"""A talk with a base and its adapters: what is said (talk.py), commands (commands.py), terminal or pipe (run.py)."""
