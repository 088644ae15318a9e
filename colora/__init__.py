"""colora: federated fine-tuning in which every site keeps its own model.

``colora.api`` is the Python API; its names are available here as well. The packages are ``colora.common``,
``colora.client``, ``colora.server``, ``colora.simulation`` and ``colora.transfer``. Importing ``colora`` imports
neither torch nor Flower.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Run, SiteModel, export, load_recipe, open_run, predict, read_events, simulate

__version__ = "0.1.0"
__all__ = ["Run", "SiteModel", "export", "load_recipe", "open_run", "predict", "read_events", "simulate"]

_here = Path(__file__).resolve().parent
if not (_here / "common").is_dir():  # a checkout or a Flower app bundle: the packages are beside this one
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("colora.api"), name)
    raise AttributeError(f"module 'colora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
