"""Many small runs: trials in processes, a sweep over settings, and claims of papers with a band and a verdict."""
