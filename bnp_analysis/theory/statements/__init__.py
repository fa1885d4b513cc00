"""The statements of the theory, one file per group of T-numbers; `suite` runs them."""
