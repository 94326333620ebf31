"""Many small runs: trials in processes, sweeps, one memo of results, and claims of papers with band and verdict."""
