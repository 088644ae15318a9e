"""colora: federated fine-tuning in which every site keeps its own model.

The rooms are ``colora.common``, ``colora.client``, ``colora.server`` and ``colora.simulation``.
"""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "common").is_dir():  # a checkout or a Flower app bundle: the rooms stand beside this package
    __path__.append(str(_here.parent))
