"""The statements of the paper and of the theory, one file per group; `suite` runs them."""
