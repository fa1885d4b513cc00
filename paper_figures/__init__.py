"""The figures of the theory: data, judgement and picture, a file of `figures/` each; `python -m paper_figures`."""
