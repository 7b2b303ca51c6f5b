"""`python -m kvcached` is the daemon."""

from kvcached.daemon import main

main()
