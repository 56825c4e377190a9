"""`train.py` that lets shards be offloaded on a CPU too, where the code runs and nothing is gained."""

from __future__ import annotations

from leanbert.cli import main
from leanbert.tasks import techniques

if __name__ == "__main__":
    techniques.TECHNIQUES = tuple(each for each in techniques.TECHNIQUES if each.name != "offload_host")
    main()
