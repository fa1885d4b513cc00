"""Condition numbers: the verbs, the routes that answer them, and what each route may claim."""
