"""The peer of compress_peers.py that has an environment of its own: optimum-onnx, as its documentation says.

    PEER_PYTHON benchmarks/compress_optimum.py FOLDER OUTPUT --processor avx512_vnni

FOLDER holds a classifier of Hugging Face. Below OUTPUT come `onnx`, the exported model, `int8`, that quantized
dynamically with a scale for each channel, and `versions.json`. Optimum's graph optimizations are left out: what they
write its quantizer refuses ("Unable to find data type", optimum-onnx 0.1.0 with onnxruntime 1.32.0).
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from optimum.onnxruntime import ORTModelForSequenceClassification, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig

PACKAGES = ("optimum-onnx", "transformers", "onnxruntime", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("output", type=Path)
    parser.add_argument("--processor", choices=("avx2", "avx512_vnni"), required=True)
    options = parser.parse_args()
    onnx = options.output / "onnx"
    ORTModelForSequenceClassification.from_pretrained(options.folder, export=True).save_pretrained(onnx)
    scheme = getattr(AutoQuantizationConfig, options.processor)(is_static=False, per_channel=True)
    ORTQuantizer.from_pretrained(onnx).quantize(scheme, options.output / "int8", file_suffix=None)
    found = {package: version(package) for package in PACKAGES}
    (options.output / "versions.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
