"""A checkpoint of your own as a bundle: PyTorch -> ONNX -> verified on every engine that is here.

    python examples/03_export.py CHECKPOINT.pt BUNDLE

Needs the workstation side: pip install 'edgeseg[export]'
"""

from __future__ import annotations

import sys

from edgeseg.export.package import ExportRequest, export_bundle


def main(checkpoint: str, bundle: str) -> None:
    """Exports a BiSeNetV2 ``checkpoint`` at 384x480 and prints how it compares with PyTorch."""
    made = export_bundle(
        ExportRequest(model="bisenetv2", weights=checkpoint, size="384x480"), bundle
    )
    print(made.verification.render())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
