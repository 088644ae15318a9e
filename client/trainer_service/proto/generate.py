"""Generate the ``trainer_pb2`` modules: ``python -m colora.client.trainer_service.proto.generate``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

PACKAGE = "colora/client/trainer_service/proto"
FOLDER = Path(__file__).resolve().parent


def generate() -> dict[str, str]:
    """Return the text of every generated module by its file name. Needs grpcio-tools, from the ``test`` extra.

    protoc writes absolute imports; they are replaced by relative ones, which this project uses.
    """
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as out:
        outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
        code = protoc.main(["protoc", f"-I{PACKAGE}={FOLDER}", *outputs, f"{PACKAGE}/trainer.proto"])
        if code:
            sys.exit(code)
        absolute = f"from {PACKAGE.replace('/', '.')} import "
        generated = sorted((Path(out) / PACKAGE).iterdir())
        return {file.name: file.read_text().replace(absolute, "from . import ") for file in generated}


if __name__ == "__main__":
    for name, text in generate().items():
        (FOLDER / name).write_text(text)
