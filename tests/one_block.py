"""`put` stores a block with the daemon on the default socket, `get` fetches it and compares. Exit code 0: done."""

import sys

from support import chain, same_tensors, tiny_spec

from kvcached_client import Client

with Client(tiny_spec(weights="one block")) as client:
    (block,) = chain(client, range(4))
    if sys.argv[1] == "put":
        (result,) = client.put([block])
        sys.exit(0 if result.code == "OK" else f"not stored: {result}")
    (found,) = client.get([block.block_hash])
    sys.exit(0 if found and same_tensors(dict(found.tensors), dict(block.tensors)) else "not found, or not the same")
