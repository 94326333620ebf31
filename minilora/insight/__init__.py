"""What lessons show: parameter counts, memory, spectra, pictures."""
