"""Krylov spaces: the three-term recurrence and its relatives, with full reorthogonalization where bounds rest on it."""
