"""``python -m colora.client.trainer_service.proto.generate`` writes the generated modules anew; a test compares them with it."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

PACKAGE = "colora/client/trainer_service/proto"
HERE = Path(__file__).resolve().parent


def generate() -> dict[str, str]:
    """File name → text of every generated module. Needs grpcio-tools, which comes with the ``test`` extra.

    protoc knows absolute imports only, and rooms import relatively.
    """
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as out:
        kinds = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
        code = protoc.main(["protoc", f"-I{PACKAGE}={HERE}", *kinds, f"{PACKAGE}/trainer.proto"])
        if code:
            sys.exit(code)
        absolute = f"from {PACKAGE.replace('/', '.')} import "
        made = sorted((Path(out) / PACKAGE).iterdir())
        return {file.name: file.read_text().replace(absolute, "from . import ") for file in made}


if __name__ == "__main__":
    for name, text in generate().items():
        (HERE / name).write_text(text)
