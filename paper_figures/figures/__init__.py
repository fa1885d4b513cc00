"""One file per figure; what each must define is in `frame`."""
