"""`slot_holder.py TARGET WEIGHTS N_TOKENS`: gets the blocks of a prompt, says so, and holds them until it is killed."""

import sys
import time

from support import attached, tiny_spec

from kvcached_client import Client

target, weights, n_tokens = sys.argv[1:]
client = Client(tiny_spec(weights=weights), target=target)
attached(client)
held = list(client.get(client.chain(range(int(n_tokens)))))
items = client.get(client.chain(range(int(n_tokens))))  # and is in the middle of another call
held.append(next(items))
print(sum(block is not None for block in held), flush=True)
time.sleep(600)
