"""What is asked of a spectrum: eigenpairs, densities, traces, ranks; and what is checked and left out first."""
