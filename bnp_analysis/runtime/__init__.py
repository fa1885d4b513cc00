"""Utilities for all subpackages; it imports only `errors` from the package.

`trees` tensors inside tuples, lists and dicts; `memory` what there is; `progress` how work reports and is stopped;
`random` local streams and the global states; `threads` one lock, settings of the process, workers; `float32` products
in full precision; `files` written whole or not at all; `kinds` the one gate for arguments of the wrong kind.
"""
