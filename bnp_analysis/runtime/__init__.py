"""What every room uses and none owns; it imports nothing of the package but `errors`.

`trees` tensors inside tuples, lists and dicts; `memory` what there is; `progress` how work reports and is stopped;
`random` local streams and the global states; `threads` one lock, settings of the process, workers; `float32` products
in full precision; `files` written whole or not at all; `kinds` the one gate for arguments of the wrong kind.
"""
