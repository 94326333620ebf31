"""One file per claim: what a paper says, what is run here, the band fixed before the run."""
