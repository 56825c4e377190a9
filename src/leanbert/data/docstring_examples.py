from pathlib import Path


def embedded_examples(kind: str, cache_dir: Path) -> dict[str, Path]:
    raise NotImplementedError
