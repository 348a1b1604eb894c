"""`python -m hub ROOT`: serve the folder ROOT until standard input ends; prints the endpoint first."""

import argparse
import sys
import threading
from pathlib import Path

from support.hub import read_routes, repo_routes, write_routes  # noqa: F401  importing registers the routes
from support.hub.handler import Server

parser = argparse.ArgumentParser(prog="hub")
parser.add_argument("root", type=Path)
parser.add_argument("--port", type=int, default=0)
parser.add_argument("--part-bytes", type=int, default=1 << 20, help="LFS objects above this go up in parts")
parser.add_argument("--tree-page", type=int, default=20, help="entries per page of a tree listing")
arguments = parser.parse_args()
with Server(arguments.root, arguments.port, arguments.part_bytes, arguments.tree_page) as server:
    print(server.endpoint, flush=True)

    def follow() -> None:
        """Nobody's orphan: when standard input ends, so does the server."""
        sys.stdin.read()
        server.shutdown()

    threading.Thread(target=follow, daemon=True).start()
    server.serve_forever()
